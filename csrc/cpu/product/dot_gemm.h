// C = A * B (+ bias, ReLU) by dot products, for B of contiguous columns: the rows of a weight.
//
// Both operands are read as they lie, a vector of the summed dimension at a time, so nothing is packed but an A that is
// masked or transposed; the price is one horizontal sum per element of C. A tile of kDotRows rows of A by kDotColumns
// columns of B shares each loaded vector.
#pragma once

#include "gemm.h"

namespace mnist_ext::MNIST_EXT_ISA {

// The accumulators of a full tile, a vector of each of its rows and one of a column fill the registers.
inline constexpr int kDotRows = kVectorRegisters == 32 ? 6 : 3;
inline constexpr int kDotColumns = 4;  // summed together

// t.a and t.b are contiguous along K.
template <class T, int R, int N>
void dot_tile(const Tile<T>& t) {
  using V = Vec<T>;
  V acc[R][kDotColumns] = {};  // those beyond N stay 0
  const T* a = t.a;
  const T* b = t.b;
  const auto step = [&](auto load) __attribute__((always_inline)) {
    V av[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) av[r] = load(a + r * t.a_stride);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const V bv = load(b + n * t.ldb);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][n] = fma(av[r], bv, acc[r][n]);
    }
  };
  int64_t p = 0;
  for (; p + V::width <= t.K; p += V::width, a += V::width, b += V::width) {
    step([](const T* q) __attribute__((always_inline)) { return V::load(q); });
  }
  if (p < t.K) {
    const int rest = static_cast<int>(t.K - p);
    step([rest](const T* q) __attribute__((always_inline)) { return V::load_partial(q, rest); });
  }
  Four<T> add = t.add ? Four<T>::load(t.add, N) : Four<T>{};
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    Four<T> sum = reduce_add(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
    if (r > 0 && t.ldadd != 0) add = Four<T>::load(t.add + r * t.ldadd, N);
    if (t.add) sum.raw += add.raw;
    if (t.relu) sum.raw = sum.raw < T(0) ? T(0) : sum.raw;  // NaN stays NaN
    sum.store(t.c + r * t.ldc, N);
  }
}

template <class T>
void dot_tile(const Tile<T>& t, int rows, int columns) {
  with_constant<kDotRows>(rows, [&]<int R>(Constant<R>) __attribute__((always_inline)) {
    with_constant<kDotColumns>(columns,
                               [&]<int N>(Constant<N>) __attribute__((always_inline)) { dot_tile<T, R, N>(t); });
  });
}

// The part of the rows of A that is read again for each tile of columns: it stays in the second-level cache. A long K
// is taken in blocks, so that a good number of rows fits and the columns of B are not read too often.
inline constexpr int64_t kDotBlockBytes = 256 * 1024;
template <class T>
inline constexpr int64_t kDotK = 8192 / sizeof(T);

// Asks for the part-th of `parts` pieces of these rows.
template <class T>
void prefetch_rows(const T* rows, int64_t stride, int64_t count, int64_t K, int64_t part, int64_t parts) {
  constexpr int64_t line = 64 / sizeof(T);
  const Range share = split(K, line, part, parts);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t p = share.begin; p < share.end; p += line) __builtin_prefetch(rows + r * stride + p);
  }
}

// All of C, which is not empty, by one block of K.
template <class T>
void dot_gemm_block(const Block<T>& g, Range k) {
  constexpr int64_t unit = Vec<T>::width;
  const int64_t row_tiles = (g.M + kDotRows - 1) / kDotRows;
  const int64_t column_tiles = (g.N + kDotColumns - 1) / kDotColumns;
  const bool first = k.begin == 0 && !g.accumulate, transposed = g.a_is_transposed(), packs = g.packs_a();
  const int64_t row_size = k.size() < 1 ? unit : (k.size() + unit - 1) / unit * unit;
  const int64_t row_bytes = row_size * static_cast<int64_t>(sizeof(T));
  // Where B stays in the second-level cache, each tile of A is read from memory once, while the one before it is
  // multiplied.
  const bool one_by_one = !transposed && g.N * row_bytes <= kDotBlockBytes;
  const int64_t fitting = kDotBlockBytes / (row_bytes * kDotRows), block = one_by_one || fitting < 1 ? 1 : fitting;
  T* packed = packs ? b_block_scratch<T>() : nullptr;
  static_assert(kDotRows * kDotK<T> <= kBlockK * kColumnBlock<T> &&
                kDotBlockBytes <= kBlockK * kColumnBlock<T> * static_cast<int64_t>(sizeof(T)));

  const int64_t size = g.M / row_tiles, larger = g.M % row_tiles;
  const auto rows_of = [&](int64_t tile) {  // split(g.M, 1, tile, row_tiles), without its divisions
    const int64_t row = tile * size + (tile < larger ? tile : larger);
    return Range{row, row + size + (tile < larger ? 1 : 0)};
  };

  for (int64_t begin = 0; begin < row_tiles; begin += block) {
    const int64_t end = row_tiles - begin < block ? row_tiles : begin + block;
    const int64_t first_row = rows_of(begin).begin;
    if (packs) pack_a_rows(g, {first_row, rows_of(end - 1).end}, k, packed, row_size);
    for (int64_t j = 0; j < column_tiles; ++j) {
      if (one_by_one && end < row_tiles) {
        const Range next = rows_of(end);
        prefetch_rows(g.a.data + next.begin * g.a.outer_stride + k.begin, g.a.outer_stride, next.size(), k.size(), j,
                      column_tiles);
      }
      const int64_t column = j * kDotColumns, rest = g.N - column;
      for (int64_t i = begin; i < end; ++i) {
        const Range rows = rows_of(i);
        T* c = g.c + rows.begin * g.ldc + column;
        const Tile<T> t = {.K = k.size(),
                           .a = packs ? packed + (rows.begin - first_row) * row_size
                                      : g.a.data + rows.begin * g.a.outer_stride + k.begin,
                           .a_stride = packs ? row_size : g.a.outer_stride,
                           .a_k_stride = 1,
                           .b = g.b.data + column * g.b.outer_stride + k.begin,
                           .ldb = g.b.outer_stride,
                           .c = c,
                           .ldc = g.ldc,
                           .add = !first   ? c
                                  : g.bias ? g.bias + column
                                           : nullptr,
                           .ldadd = first ? 0 : g.ldc,
                           .relu = g.relu && k.end == g.K};
        dot_tile(t, static_cast<int>(rows.size()), rest < kDotColumns ? static_cast<int>(rest) : kDotColumns);
      }
    }
  }
}

// All of C, on the calling thread.
template <class T>
void dot_gemm(const Block<T>& g) {
  const int64_t blocks = g.K < 1 ? 1 : (g.K + kDotK<T> - 1) / kDotK<T>;
  for (int64_t i = 0; i < blocks; ++i) dot_gemm_block(g, split(g.K, Vec<T>::width, i, blocks));
}

}  // namespace mnist_ext::MNIST_EXT_ISA
