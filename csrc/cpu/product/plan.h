// The three products of a linear layer, each as one GEMM that reads its operands where they lie.
#pragma once

#include "column_sums.h"
#include "dot_gemm.h"

namespace mnist_ext::MNIST_EXT_ISA {

// Which product is faster, measured by benchmarks/products.py. Dot products save the packing, which few rows do not pay
// back, and pay with sums over lanes, which a short depth does not pay back, and with reading a weight that fits in no
// cache more often; of few columns, outer products leave part of a tile empty. With vectors of 128 bits an outer
// product's broadcasts are no loads, and cost more than the sums.
template <class T>
bool use_dot_products(int64_t rows, int64_t depth, int64_t columns) {
  constexpr bool large_tiles = kVectorRegisters == 32;
  constexpr int64_t large_weight = int64_t{8} << 20;  // bytes
  if (depth < Vec<T>::width && columns >= 64 * Vec<T>::width) return false;
  if (kVectorBytes == 16 || columns <= kDotColumns) return true;
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

// Dot products read B along the summed dimension: of a forward a row-major weight, of a backward what lies column by
// column.
template <class T>
bool uses_dot_products(const Product<T>& g) {
  return g.b_depth == 1 && g.b_column != 1 && use_dot_products<T>(g.rows, g.depth, g.columns);
}

// A single column is computed as a row by outer products, where A lies column by column or has short rows.
template <class T>
bool is_better_transposed(const Product<T>& g) {
  return g.columns == 1 && g.rows > 1 && g.c_row == 1 && !g.a_gate &&
         (g.a_depth != 1 || !use_dot_products<T>(1, g.depth, g.rows));
}

// That part of C, on the calling thread.
template <class T>
void product_part(const Product<T>& g, bool dots, Range rows, Range columns) {
  if (rows.size() == 0 || columns.size() == 0) return;
  multiply_in_pieces(g, rows, columns, dots ? dot_gemm<T> : gemm<T>);
}

template <class T>
void product_part(const Product<T>& g, Range rows, Range columns) {
  if (is_better_transposed(g)) return product_part(g.transposed(), columns, rows);
  product_part(g, uses_dot_products(g), rows, columns);
}

// How many of `threads` to give to the rows of C, the rest to its columns. Of dot products all to the columns, unless
// each thread would have to pack A: each reads its own part of the weights, which stays in its core's cache from one
// step of training to the next. Of outer products all to the rows: threads that share the rows of C write side by side,
// and each reads all of B; where that fits into no second-level cache, it costs as much as one more tile of rows.
// Otherwise where the busiest thread has a tenth less to do.
template <class T>
int row_threads(const Product<T>& g, bool dots, int threads) {
  if (threads == 1) return 1;
  constexpr int64_t large = int64_t{2} << 20;  // bytes
  const auto tiles = [](int64_t n, int64_t unit) { return (n + unit - 1) / unit; };
  const int64_t row_tiles = tiles(g.rows, dots ? kDotRows : kTileRows);
  const int64_t column_tiles = tiles(g.columns, dots ? kDotColumns : Vec<T>::width);
  const int64_t reading = !dots && g.depth * g.columns * static_cast<int64_t>(sizeof(T)) > large ? 1 : 0;
  int best = 0;
  double best_cost = 0;
  for (int divisor = 1; divisor <= threads; ++divisor) {
    if (threads % divisor != 0) continue;
    const int by_row = dots && !g.packs_a() ? divisor : threads / divisor;
    const double cost = static_cast<double>(tiles(row_tiles, by_row) + reading) *
                        static_cast<double>(tiles(column_tiles, threads / by_row));
    if (divisor == 1 || cost < 0.9 * best_cost) {
      best = by_row;
      best_cost = cost;
    }
  }
  return best;
}

// What thread `thread` of `count` does of the whole product.
template <class T>
void product_share(const Product<T>& g, bool dots, int thread, int count) {
  const int by_row = row_threads(g, dots, count), by_column = count / by_row;
  product_part(g, dots, split(g.rows, 1, thread / by_column, by_row),
               split(g.columns, dots ? kDotColumns : Vec<T>::width, thread % by_column, by_column));
}

template <class T>
void product_share(const Product<T>& g, int thread, int count) {
  if (is_better_transposed(g)) return product_share(g.transposed(), thread, count);
  product_share(g, uses_dot_products(g), thread, count);
}

// Each product, and what thread `thread` of `count` does of it.
template <class T>
Product<T> forward_product(const LinearForward<T>& x) {
  return {.rows = x.rows,
          .columns = x.out_features,
          .depth = x.in_features,
          .a = x.input.data,
          .a_row = x.input.row_stride,
          .a_depth = x.input.column_stride,
          .b = x.weight.data,
          .b_depth = x.weight.column_stride,
          .b_column = x.weight.row_stride,
          .c = x.out,
          .c_row = x.out_features,
          .bias = x.bias,
          .relu = x.activation == Activation::relu};
}

template <class T>
void linear_forward_share(const LinearForward<T>& x, int thread, int count) {
  product_share(forward_product(x), thread, count);
}

template <class T>
void grad_input_share(const LinearBackward<T>& x, int thread, int count) {
  if (!x.grad_input) return;
  product_share<T>({.rows = x.rows,
                    .columns = x.in_features,
                    .depth = x.out_features,
                    .a = x.grad_output,
                    .a_row = x.grad_output_stride,
                    .a_depth = 1,
                    .b = x.weight.data,
                    .b_depth = x.weight.row_stride,
                    .b_column = x.weight.column_stride,
                    .c = x.grad_input,
                    .c_row = x.in_features,
                    .a_gate = x.output,
                    .gate_row = x.output_stride,
                    .gate_depth = 1},
                   thread, count);
}

// And of grad_bias.
template <class T>
void grad_weight_share(const LinearBackward<T>& x, int thread, int count) {
  if (x.grad_weight) {
    product_share<T>({.rows = x.out_features,
                      .columns = x.in_features,
                      .depth = x.rows,
                      .a = x.grad_output,
                      .a_row = 1,
                      .a_depth = x.grad_output_stride,
                      .b = x.input.data,
                      .b_depth = x.input.row_stride,
                      .b_column = x.input.column_stride,
                      .c = x.grad_weight,
                      .c_row = x.in_features,
                      .a_gate = x.output,
                      .gate_row = 1,
                      .gate_depth = x.output_stride},
                     thread, count);
  }
  if (x.grad_bias) {
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
