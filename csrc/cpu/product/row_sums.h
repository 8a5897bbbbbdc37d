// The row sums of a product's A, over K: the gradient of a bias.
//
// In vectors over kSumChain steps of K at a time, then in double, rounded once: no long chain of additions rounds in T.
// Several vectors of rows at once, as each addition waits for the one before it.
#pragma once

#include "../sgd.h"
#include "block.h"

namespace mnist_ext::MNIST_EXT_ISA {

inline constexpr int64_t kSumChain = 8;
template <class T>
inline constexpr int64_t kSummedRows = 4 * Vec<T>::width;

template <class T, int N, bool partial>
void sum_rows(const Product<T>& p, int64_t m, int last, T* sums) {
  using V = Vec<T>;
  const auto load = [&](const T* step, int v) __attribute__((always_inline)) {
    const T* at = step + m + v * V::width;
    return partial && v == N - 1 ? V::load_partial(at, last) : V::load(at);
  };
  double totals[N * V::width] = {};
  for (int64_t begin = 0; begin < p.K; begin += kSumChain) {
    const int64_t end = p.K - begin < kSumChain ? p.K : begin + kSumChain;
    V sum[N] = {};
    for (int64_t k = begin; k < end; ++k) {
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) {
        V value = load(p.a.data + k * p.a.k_stride, v);
        if (p.relu_mask.data) value = where_positive(load(p.relu_mask.data + k * p.relu_mask.k_stride, v), value);
        sum[v] = sum[v] + value;
      }
    }
    for (int j = 0; j < N * V::width; ++j) totals[j] += static_cast<double>(sum[j / V::width].raw[j % V::width]);
  }
  const int rows = (N - 1) * V::width + last;
  for (int j = 0; j < rows; ++j) sums[j] = static_cast<T>(totals[j]);
}

// Of the n <= kSummedRows rows from m on.
template <class T>
void sum_rows(const Product<T>& p, int64_t m, int64_t n, T* sums) {
  constexpr int width = Vec<T>::width;
  const int vectors = static_cast<int>((n + width - 1) / width), last = static_cast<int>(n - (vectors - 1) * width);
  with_constant<4>(vectors, [&]<int N>(Constant<N>) __attribute__((always_inline)) {
    last == width ? sum_rows<T, N, false>(p, m, last, sums) : sum_rows<T, N, true>(p, m, last, sums);
  });
}

// The sums of some rows, stored, or a parameter's update by them.
template <class T>
void row_sums(const Product<T>& p, Range rows) {
  const ParameterUpdate<T>& update = p.row_sums_update;
  const SgdUpdate<T> sgd(update.options);
  T sums[kSummedRows<T>];
  for (int64_t m = rows.begin; m < rows.end; m += kSummedRows<T>) {
    const int64_t n = rows.end - m < kSummedRows<T> ? rows.end - m : kSummedRows<T>;
    sum_rows(p, m, n, sums);
    for (int64_t i = 0; p.accumulate && i < n; ++i) sums[i] += p.row_sums[m + i];
    if (p.row_sums) std::memcpy(p.row_sums + m, sums, n * sizeof(T));
    if (!update.param) continue;
    for_each_vector<T>(n, [&](int64_t i, int lanes) {
      T* buffer = update.momentum_buffer ? update.momentum_buffer + m + i : nullptr;
      sgd(update.param + m + i, Vec<T>::load(sums + i), buffer, lanes);
    });
  }
}

}  // namespace mnist_ext::MNIST_EXT_ISA
