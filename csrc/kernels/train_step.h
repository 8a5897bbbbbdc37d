// Steps of SGD on a multilayer perceptron, each in one pass over the model: forward, softmax cross-entropy, backward
// and update.
//
//   x_0 = images;  x_{l+1} = activation_l(x_l * weight_l^T + bias_l);  loss = cross_entropy(x_depth, target)
//   and every parameter that has a group is updated from the loss's gradient, as in sgd.h
//
// No gradient of a parameter is kept. What each layer computes, in which precision and which order of summation, is
// linear.h's, the loss cross_entropy.h's, the update sgd.h's: the results are the bits of those kernels called one
// after the other, and do not depend on the number of threads.
// Aliasing: parameters and momentum buffers overlap neither each other nor anything else; ops/extents.h checks that.
#pragma once

#include <cstdint>

#include "cross_entropy.h"
#include "linear.h"
#include "sgd.h"

namespace mnist_ext {

template <class T>
struct TrainedParameter {
  T* data;             // contiguous; a bias may be null
  T* momentum_buffer;  // laid out as data; null if its group has no momentum
  int group;           // its options in TrainSteps::groups; -1: frozen
  bool first_step;     // the momentum buffer holds nothing yet
};

template <class T>
struct TrainedLayer {
  int64_t in_features, out_features;  // at least 1
  TrainedParameter<T> weight;         // [out_features, in_features]
  TrainedParameter<T> bias;           // [out_features]
  Activation activation;
};

// Rows of in_features numbers; of T, or of uint8 that count as value * scale + shift.
template <class T>
struct Images {
  const T* values;        // or null:
  const uint8_t* pixels;  // or null
  int64_t row_stride;
  T scale, shift;  // of pixels
};

template <class T>
struct TrainSteps {
  const TrainedLayer<T>* layers;
  int64_t depth;  // number of layers, at least 1
  Images<T> images;
  ClassIndices target;
  const int64_t* order;   // [examples], each in bounds: their rows in images and target; null: 0, 1, 2, ...
  int64_t examples;       // in all steps together
  int64_t batch_size;     // of each step but the last, which has what is left; a single step may have 0 examples
  const T* class_weight;  // [classes], or null
  int64_t ignore_index;
  double label_smoothing;
  Reduction reduction;       // mean or sum
  const SgdOptions* groups;  // lr and first_step do not count
  int64_t group_count;
  const double* lr;  // [steps, group_count]
  T* losses;         // [steps]

  int64_t steps() const { return examples <= batch_size ? 1 : (examples + batch_size - 1) / batch_size; }
};

// Returns -1, or, having updated nothing, the first example, counted in order, whose target is neither ignore_index nor
// a class. Throws std::bad_alloc, having updated nothing.
template <class T>
int64_t train_steps(const TrainSteps<T>& args, int threads);

}  // namespace mnist_ext
