// The three products of a linear layer, each as one GEMM that reads its operands where they lie.
#pragma once

#include "../linear.h"
#include "dot_gemm.h"
#include "gemm.h"

namespace mnist_ext::MNIST_EXT_ISA {

// Which product is faster, measured by benchmarks/products.py. Dot products save the packing, which few rows do not pay
// back, and pay with sums over lanes, which a short depth does not pay back, and with reading a weight that fits in no
// cache more often; of few columns, outer products leave part of a tile empty. With vectors of 128 bits an outer
// product's broadcasts are no loads, and cost more than the sums.
template <class T>
bool use_dot_products(int64_t rows, int64_t depth, int64_t columns) {
  constexpr bool large_tiles = kVectorRegisters == 32;
  constexpr int64_t large_weight = int64_t{8} << 20;  // bytes
  if (kVectorBytes == 16) return true;
  if (columns < 2 * Vec<T>::width) return rows <= 512 || depth > 128;
  if (depth <= 16 * Vec<T>::width) return rows < (large_tiles ? 128 : 64);
  return rows <= (depth * columns * static_cast<int64_t>(sizeof(T)) < large_weight ? 256 : 96);
}

inline constexpr double kLinearGrain = 250e3;  // multiply-adds that are worth a thread of their own
// To read or write a weight costs as much as to multiply it with so many rows (benchmarks/training.py, batch 1).
inline constexpr int64_t kFewestRows = 8;

// Of one product, as far as they cost time.
inline double multiply_adds(int64_t rows, int64_t in_features, int64_t out_features) {
  const int64_t counted = rows == 0 || rows > kFewestRows ? rows : kFewestRows;
  return static_cast<double>(counted) * static_cast<double>(in_features) * static_cast<double>(out_features);
}

// What thread `thread` of `count` does of each product.
template <class T>
void linear_forward_share(const LinearForward<T>& x, int thread, int count) {
  const bool relu = x.activation == Activation::relu;
  if (use_dot_products<T>(x.rows, x.in_features, x.out_features)) {
    dot_gemm_share<T>({.rows = x.rows,
                       .columns = x.out_features,
                       .depth = x.in_features,
                       .x = x.input,
                       .x_row = x.input_stride,
                       .w = x.weight,
                       .w_row = x.weight_stride,
                       .bias = x.bias,
                       .relu = relu,
                       .c = x.out},
                      thread, count);
  } else {
    gemm_share<T>({.rows = x.rows,
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
                  thread, count);
  }
}

template <class T>
void grad_input_share(const LinearBackward<T>& x, int thread, int count) {
  if (!x.grad_input) return;
  gemm_share<T>({.rows = x.rows,
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
                thread, count);
}

// And of grad_bias.
template <class T>
void grad_weight_share(const LinearBackward<T>& x, int thread, int count) {
  if (x.grad_weight) {
    gemm_share<T>({.rows = x.out_features,
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
                   .row_sums = x.grad_bias},
                  thread, count);
  } else if (x.grad_bias) {
    const Range columns = split(x.out_features, Vec<T>::width, thread, count);
    column_sums<T>({x.rows, x.grad_output, x.grad_output_stride, x.output, x.output_stride}, columns,
                   x.grad_bias + columns.begin);
  }
}

template <class T>
void linear_forward(const LinearForward<T>& x, int threads) {
  parallel(threads_for(multiply_adds(x.rows, x.in_features, x.out_features), kLinearGrain, threads),
           [&](int thread, int count) { linear_forward_share(x, thread, count); });
}

template <class T>
void linear_backward(const LinearBackward<T>& x, int threads) {
  parallel(threads_for(multiply_adds(x.rows, x.in_features, x.out_features), kLinearGrain, threads),
           [&](int thread, int count) {
             grad_input_share(x, thread, count);
             grad_weight_share(x, thread, count);
           });
}

}  // namespace mnist_ext::MNIST_EXT_ISA
