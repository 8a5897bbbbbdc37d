// C = X * W^T (+ bias, ReLU) by dot products along contiguous rows.
//
// Both operands are read as they lie, a vector of the summed dimension at a time, so nothing is packed; the price is
// one horizontal sum per element of C. A tile of kDotRows rows of X by kDotColumns rows of W shares each loaded vector.
// Threads divide the rows of W: each reads its own part of the weights, which stays in its core's cache from one step
// of training to the next.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace mnist_ext::MNIST_EXT_ISA {

template <class T>
struct DotGemm {
  int64_t rows, columns, depth;
  const T* x;  // [rows, depth]
  int64_t x_row;
  const T* w;  // [columns, depth]
  int64_t w_row;
  const T* bias;  // [columns], or null
  bool relu;
  T* c;  // [rows, columns], contiguous
};

// The accumulators of a full tile, a vector of each of its rows and one of a column fill the registers.
inline constexpr int kDotRows = kVectorRegisters == 32 ? 6 : 3;
inline constexpr int kDotColumns = 4;  // summed together

// One tile of C: the part of the sums that `depth` makes, added to C so far unless it is the first.
template <class T, int R, int N>
void dot_tile(const DotGemm<T>& g, int64_t row, int64_t column, Range depth) {
  using V = Vec<T>;
  V acc[R][kDotColumns] = {};  // those beyond N stay 0
  const T* x = g.x + row * g.x_row + depth.begin;
  const T* w = g.w + column * g.w_row + depth.begin;
  const auto step = [&](auto load) __attribute__((always_inline)) {
    V xv[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) xv[r] = load(x + r * g.x_row);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const V wv = load(w + n * g.w_row);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][n] = fma(xv[r], wv, acc[r][n]);
    }
  };
  int64_t p = depth.begin;
  for (; p + V::width <= depth.end; p += V::width, x += V::width, w += V::width) {
    step([](const T* q) __attribute__((always_inline)) { return V::load(q); });
  }
  if (p < depth.end) {
    const int rest = static_cast<int>(depth.end - p);
    step([rest](const T* q) __attribute__((always_inline)) { return V::load_partial(q, rest); });
  }
  const bool first = depth.begin == 0, last = depth.end == g.depth;
  const Four<T> bias = g.bias && first ? Four<T>::load(g.bias + column, N) : Four<T>{};
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    T* c = g.c + (row + r) * g.columns + column;
    Four<T> sum = reduce_add(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
    if (!first) {
      sum.raw += Four<T>::load(c, N).raw;
    } else if (g.bias) {
      sum.raw += bias.raw;
    }
    if (g.relu && last) sum.raw = sum.raw < T(0) ? T(0) : sum.raw;  // NaN stays NaN
    sum.store(c, N);
  }
}

template <class T, int R>
void dot_tile_rows(const DotGemm<T>& g, int64_t row, int64_t column, int64_t columns, Range depth) {
  switch (columns) {
    case 1: return dot_tile<T, R, 1>(g, row, column, depth);
    case 2: return dot_tile<T, R, 2>(g, row, column, depth);
    case 3: return dot_tile<T, R, 3>(g, row, column, depth);
    default: return dot_tile<T, R, 4>(g, row, column, depth);
  }
}

template <class T>
void dot_tile(const DotGemm<T>& g, int64_t row, int64_t rows, int64_t column, int64_t columns, Range depth) {
  if constexpr (kDotRows == 6) {
    if (rows == 6) return dot_tile_rows<T, 6>(g, row, column, columns, depth);
    if (rows == 5) return dot_tile_rows<T, 5>(g, row, column, columns, depth);
    if (rows == 4) return dot_tile_rows<T, 4>(g, row, column, columns, depth);
  }
  if (rows == 3) return dot_tile_rows<T, 3>(g, row, column, columns, depth);
  if (rows == 2) return dot_tile_rows<T, 2>(g, row, column, columns, depth);
  dot_tile_rows<T, 1>(g, row, column, columns, depth);
}

// The part of the rows of X that is read again for each tile of columns: it stays in the second-level cache. Deep rows
// are taken in parts, so that a good number of them fits and the rows of W are not read too often.
inline constexpr int64_t kDotBlockBytes = 256 * 1024;
template <class T>
inline constexpr int64_t kDotDepth = 8192 / sizeof(T);

// Asks for the part-th of `parts` pieces of these rows.
template <class T>
void prefetch_rows(const T* rows, int64_t stride, int64_t count, int64_t depth, int64_t part, int64_t parts) {
  constexpr int64_t line = 64 / sizeof(T);
  const Range share = split(depth, line, part, parts);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t p = share.begin; p < share.end; p += line) __builtin_prefetch(rows + r * stride + p);
  }
}

// All rows of C by the given columns, on the calling thread.
template <class T>
void dot_gemm_part(const DotGemm<T>& g, Range columns) {
  const int64_t row_tiles = (g.rows + kDotRows - 1) / kDotRows;
  const int64_t column_tiles = (columns.size() + kDotColumns - 1) / kDotColumns;
  const int64_t parts = g.depth < 1 ? 1 : (g.depth + kDotDepth<T> - 1) / kDotDepth<T>;
  for (int64_t part = 0; part < parts; ++part) {
    const Range depth = split(g.depth, Vec<T>::width, part, parts);
    const auto tile = [&](Range r, int64_t column) {
      const int64_t rest = columns.end - column;
      dot_tile(g, r.begin, r.size(), column, rest < kDotColumns ? rest : kDotColumns, depth);
    };
    const int64_t row_bytes = (depth.size() < 1 ? 1 : depth.size()) * static_cast<int64_t>(sizeof(T));
    if (columns.size() * row_bytes <= kDotBlockBytes) {
      // The rows of W stay in the second-level cache. Each tile of X is read from memory once, while the one before it
      // is multiplied.
      for (int64_t i = 0; i < row_tiles; ++i) {
        const Range r = split(g.rows, 1, i, row_tiles), next = split(g.rows, 1, i + 1, row_tiles);
        for (int64_t j = 0; j < column_tiles; ++j) {
          if (i + 1 < row_tiles) {
            prefetch_rows(g.x + next.begin * g.x_row + depth.begin, g.x_row, next.size(), depth.size(), j,
                          column_tiles);
          }
          tile(r, columns.begin + j * kDotColumns);
        }
      }
      continue;
    }
    const int64_t fitting = kDotBlockBytes / (row_bytes * kDotRows), block = fitting < 1 ? 1 : fitting;
    for (int64_t begin = 0; begin < row_tiles; begin += block) {
      const int64_t end = row_tiles - begin < block ? row_tiles : begin + block;
      for (int64_t j = 0; j < column_tiles; ++j) {
        for (int64_t i = begin; i < end; ++i) tile(split(g.rows, 1, i, row_tiles), columns.begin + j * kDotColumns);
      }
    }
  }
}

// What thread `thread` of `count` does of the whole product.
template <class T>
void dot_gemm_share(const DotGemm<T>& g, int thread, int count) {
  dot_gemm_part(g, split(g.columns, kDotColumns, thread, count));
}

}  // namespace mnist_ext::MNIST_EXT_ISA
