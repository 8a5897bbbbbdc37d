// Sums over the rows of a matrix: the gradient of a bias.
//
// In vectors over kSumChain rows at a time, then in double, rounded once: no long chain of additions rounds in T.
// Several vectors of columns at once, as each addition waits for the one before it.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace mnist_ext::MNIST_EXT_ISA {

template <class T>
struct GatedRows {
  int64_t rows;
  const T* data;
  int64_t stride;
  const T* gate;  // laid out like data; where it is <= 0, data counts as 0; or null
  int64_t gate_stride;
};

inline constexpr int64_t kSumChain = 8;
template <class T>
inline constexpr int64_t kSummedColumns = 4 * Vec<T>::width;

template <class T, int N, bool partial>
void sum_columns(const GatedRows<T>& x, int64_t column, int last, T* sums) {
  using V = Vec<T>;
  const auto load = [&](const T* row, int v) __attribute__((always_inline)) {
    const T* p = row + column + v * V::width;
    return partial && v == N - 1 ? V::load_partial(p, last) : V::load(p);
  };
  double totals[N * V::width] = {};
  for (int64_t begin = 0; begin < x.rows; begin += kSumChain) {
    const int64_t end = x.rows - begin < kSumChain ? x.rows : begin + kSumChain;
    V sum[N] = {};
    for (int64_t row = begin; row < end; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) {
        V value = load(x.data + row * x.stride, v);
        if (x.gate) value = where_positive(load(x.gate + row * x.gate_stride, v), value);
        sum[v] = sum[v] + value;
      }
    }
    for (int j = 0; j < N * V::width; ++j) totals[j] += static_cast<double>(sum[j / V::width].raw[j % V::width]);
  }
  const int columns = (N - 1) * V::width + last;
  for (int j = 0; j < columns; ++j) sums[j] = static_cast<T>(totals[j]);
}

// sums: of columns.begin, columns.begin + 1, ...
template <class T>
void column_sums(const GatedRows<T>& x, Range columns, T* sums) {
  constexpr int width = Vec<T>::width;
  const auto some = [&]<int N>(int64_t column, int last) {
    last == width ? sum_columns<T, N, false>(x, column, last, sums) : sum_columns<T, N, true>(x, column, last, sums);
  };
  for (int64_t column = columns.begin; column < columns.end; column += kSummedColumns<T>, sums += kSummedColumns<T>) {
    const int64_t rest = columns.end - column, n = rest < kSummedColumns<T> ? rest : kSummedColumns<T>;
    const int vectors = static_cast<int>((n + width - 1) / width), last = static_cast<int>(n - (vectors - 1) * width);
    switch (vectors) {
      case 1: some.template operator()<1>(column, last); break;
      case 2: some.template operator()<2>(column, last); break;
      case 3: some.template operator()<3>(column, last); break;
      default: some.template operator()<4>(column, last);
    }
  }
}

}  // namespace mnist_ext::MNIST_EXT_ISA
