// All layers in one parallel region, whose threads wait for each other between layers only.
#pragma once

#include "../mlp.h"
#include "barrier.h"
#include "linear_impl.h"

namespace mnist_ext::MNIST_EXT_ISA {

// Layers: LinearForward or LinearBackward.
template <class T, class Layer, class Body>
void through_layers(const Layer* layers, int64_t depth, int threads, const Body& body) {
  double work = 0;
  for (int64_t l = 0; l < depth; ++l) {
    work += multiply_adds(layers[l].rows, layers[l].in_features, layers[l].out_features);
  }
  parallel_in_phases(threads_for(work, kLinearGrain, threads), [](int, int) { reserve_product<T>(); }, body);
}

template <class T>
void mlp_forward(const LinearForward<T>* layers, int64_t depth, int threads) {
  through_layers<T>(layers, depth, threads, [&](int thread, int count, SpinBarrier& barrier) {
    for (int64_t l = 0; l < depth; ++l) {
      if (l > 0) barrier.wait(count);
      linear_forward_share(layers[l], thread, count);
    }
  });
}

template <class T>
void mlp_backward(const LinearBackward<T>* layers, int64_t depth, int threads) {
  through_layers<T>(layers, depth, threads, [&](int thread, int count, SpinBarrier& barrier) {
    for (int64_t l = depth - 1; l >= 0; --l) {
      if (l < depth - 1) barrier.wait(count);
      grad_input_share(layers[l], thread, count);
    }
    // Nothing waits for these.
    for (int64_t l = 0; l < depth; ++l) grad_weight_share(layers[l], thread, count);
  });
}

}  // namespace mnist_ext::MNIST_EXT_ISA
