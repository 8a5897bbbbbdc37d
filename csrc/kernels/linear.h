// Fused linear layer: out = activation(input * weight^T + bias), and its gradients.
//
// Precision: products are accumulated in ComputeType<T> by fused multiply-add where the instruction set has it, in
// vector lanes and in blocks of the summed dimension, of long sums in pieces of blocks: no chain of additions is longer
// than 512, or than some square root of a 256th of the summed dimension. The result is rounded to T once, after bias
// and activation. grad_bias: sums over 8 rows in ComputeType<T>, and these added up in double.
// Layout: input and weight are row-major or column-major, all others row-major with unit column stride; *_stride is the
// distance in elements between rows or columns (the leading dimension). A stride of 0 (an expanded tensor) is allowed
// for what is only read.
// Aliasing: outputs overlap nothing. Any size may be 0; a sum over nothing is 0.
// Order of summation depends on the shape, which of input and weight is column-major, the instruction set and T only,
// not on the number of threads.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace mnist_ext {

enum class Activation { none, relu };

template <class T>
struct MatrixView {
  const T* data = nullptr;  // element (row, column) is data[row * row_stride + column * column_stride]
  int64_t row_stride = 0, column_stride = 0;  // one of them is 1
};

template <class T>
struct LinearForward {
  int64_t rows, in_features, out_features;
  MatrixView<T> input;   // [rows, in_features]
  MatrixView<T> weight;  // [out_features, in_features]
  const T* bias;         // [out_features], or null
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
  MatrixView<T> input;   // [rows, in_features]; read for grad_weight only
  MatrixView<T> weight;  // [out_features, in_features]; read for grad_input only
  T* grad_input;         // [rows, in_features], contiguous, or null
  T* grad_weight;        // [out_features, in_features], contiguous, or null
  T* grad_bias;          // [out_features], or null
};

template <class T>
void linear_forward(const LinearForward<T>& args, int threads);

template <class T>
void linear_backward(const LinearBackward<T>& args, int threads);

}  // namespace mnist_ext
