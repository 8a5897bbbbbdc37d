// The three products of a linear layer, each as one GEMM that reads its operands where they lie.
#pragma once

#include "../linear.h"
#include "dot_gemm.h"
#include "gemm.h"

namespace mnist_ext::MNIST_EXT_ISA {

// Which product is faster, measured by benchmarks/products.py. Dot products save the packing, which few rows do not pay
// back, and pay with sums over lanes, which a short depth does not pay back; of few columns, outer products leave part
// of a tile empty. With vectors of 128 bits an outer product's broadcasts are no loads, and cost more than the sums.
template <class T>
bool use_dot_products(int64_t rows, int64_t depth, int64_t columns) {
  constexpr bool large_tiles = kVectorRegisters == 32;
  if (kVectorBytes == 16) return true;
  if (columns < 2 * Vec<T>::width) return rows <= 512 || depth > 128;
  if (depth <= 16 * Vec<T>::width) return rows < (large_tiles ? 128 : 64);
  return !large_tiles || rows <= 256;
}

template <class T>
void linear_forward(const LinearForward<T>& x, int threads) {
  const bool relu = x.activation == Activation::relu;
  if (use_dot_products<T>(x.rows, x.in_features, x.out_features)) {
    dot_gemm<T>({.rows = x.rows,
                 .columns = x.out_features,
                 .depth = x.in_features,
                 .x = x.input,
                 .x_row = x.input_stride,
                 .w = x.weight,
                 .w_row = x.weight_stride,
                 .bias = x.bias,
                 .relu = relu,
                 .c = x.out},
                threads);
  } else {
    gemm<T>({.rows = x.rows,
             .columns = x.out_features,
             .depth = x.in_features,
             .a = x.input,
             .a_row = x.input_stride,
             .a_depth = 1,
             .a_transposed = false,
             .b = x.weight,
             .b_depth = 1,
             .b_column = x.weight_stride,
             .c = x.out,
             .bias = x.bias,
             .relu = relu},
            threads);
  }
}

// Column sums of the gated grad_output alone, for a layer whose weight is frozen and whose bias is not.
template <class T>
void column_sums(const LinearBackward<T>& x, double* sums) {
  for (int64_t m = 0; m < x.rows; ++m) {
    const T* dy = x.grad_output + m * x.grad_output_stride;
    const T* gate = x.output ? x.output + m * x.output_stride : nullptr;
    for (int64_t n = 0; n < x.out_features; ++n) sums[n] += gate && gate[n] <= T(0) ? T(0) : dy[n];
  }
}

template <class T>
void linear_backward(const LinearBackward<T>& x, int threads) {
  if (x.grad_input) {
    gemm<T>({.rows = x.rows,
             .columns = x.in_features,
             .depth = x.out_features,
             .a = x.grad_output,
             .a_row = x.grad_output_stride,
             .a_depth = 1,
             .a_transposed = false,
             .b = x.weight,
             .b_depth = x.weight_stride,
             .b_column = 1,
             .c = x.grad_input,
             .a_gate = x.output,
             .gate_row = x.output_stride,
             .gate_depth = 1},
            threads);
  }
  double* sums = nullptr;
  if (x.grad_bias) {
    const std::size_t bytes = x.out_features * sizeof(double);
    sums = static_cast<double*>(scratch(Scratch::row_sums, bytes));
    std::memset(sums, 0, bytes);
  }
  if (x.grad_weight) {
    gemm<T>({.rows = x.out_features,
             .columns = x.in_features,
             .depth = x.rows,
             .a = x.grad_output,
             .a_row = 1,
             .a_depth = x.grad_output_stride,
             .a_transposed = true,
             .b = x.input,
             .b_depth = x.input_stride,
             .b_column = 1,
             .c = x.grad_weight,
             .a_gate = x.output,
             .gate_row = 1,
             .gate_depth = x.output_stride,
             .row_sums = x.in_features > 0 ? sums : nullptr},
            threads);
  }
  if (sums) {
    if (!x.grad_weight || x.in_features == 0) column_sums(x, sums);  // no GEMM has read grad_output
    for (int64_t n = 0; n < x.out_features; ++n) x.grad_bias[n] = static_cast<T>(sums[n]);
  }
}

}  // namespace mnist_ext::MNIST_EXT_ISA
