// The linear layers of a multilayer perceptron, one after the other: what linear.h computes for each of them, with the
// same bits, without the time between.
#pragma once

#include "linear.h"

namespace mnist_ext {

// layers[l].input is what layers[l - 1] wrote.
template <class T>
void mlp_forward(const LinearForward<T>* layers, int64_t depth, int threads);

// layers[l].grad_output is what layers[l + 1] wrote.
template <class T>
void mlp_backward(const LinearBackward<T>* layers, int64_t depth, int threads);

}  // namespace mnist_ext
