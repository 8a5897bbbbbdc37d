// Fused linear layer: out = activation(input * weight^T + bias), and its gradients.
//
// Precision: products are accumulated in ComputeType<T> by fused multiply-add where the instruction set has it, in
// vector lanes and in blocks of the summed dimension, never in one long chain; the result is rounded to T once, after
// bias and activation. grad_bias: sums over 8 rows in ComputeType<T>, and these added up in double.
// Layout: every matrix is row-major with unit column stride; *_stride is the distance in elements between rows (the
// leading dimension). A stride of 0 (an expanded tensor) is allowed for what is only read.
// Aliasing: outputs overlap nothing. Any size may be 0; a sum over nothing is 0.
// Order of summation depends on the shape, the instruction set and T only, not on the number of threads.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace mnist_ext {

enum class Activation { none, relu };

template <class T>
struct LinearForward {
  int64_t rows, in_features, out_features;
  const T* input;  // [rows, in_features]
  int64_t input_stride;
  const T* weight;  // [out_features, in_features]
  int64_t weight_stride;
  const T* bias;  // [out_features], or null
  Activation activation;
  T* out;  // [rows, out_features], contiguous
};

// With dy = grad_output, set to 0 where ReLU's output was <= 0:
//   grad_input = dy * weight      grad_weight = dy^T * input      grad_bias = column sums of dy
// A null output pointer means that this gradient is not wanted; grad_bias comes with grad_weight or alone.
template <class T>
struct LinearBackward {
  int64_t rows, in_features, out_features;
  const T* grad_output;  // [rows, out_features]
  int64_t grad_output_stride;
  const T* output;  // [rows, out_features], the forward's result if it applied ReLU, else null
  int64_t output_stride;
  const T* input;  // [rows, in_features]; read for grad_weight only
  int64_t input_stride;
  const T* weight;  // [out_features, in_features]; read for grad_input only
  int64_t weight_stride;
  T* grad_input;   // [rows, in_features], contiguous, or null
  T* grad_weight;  // [out_features, in_features], contiguous, or null
  T* grad_bias;    // [out_features], or null
};

template <class T>
void linear_forward(const LinearForward<T>& args, int threads);

template <class T>
void linear_backward(const LinearBackward<T>& args, int threads);

}  // namespace mnist_ext
