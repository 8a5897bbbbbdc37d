// The register tile: kTileRows rows of C by up to kTileVectors vectors stay in registers while K runs. Each step loads
// its vectors of B once, broadcasts one element of A per row, and does rows * vectors multiply-adds.
#pragma once

#include "../simd/vec.h"
#include "../threads/parallel.h"

namespace mnist_ext::MNIST_EXT_ISA {

inline constexpr int kTileRows = 6;
inline constexpr int kTileVectors = kVectorRegisters == 32 ? 4 : 2;
// Of a single row, which needs more of them at once: each multiply-add waits for the one before it in its vector.
inline constexpr int kRowVectors = 8;
template <class T>
inline constexpr int64_t kTileColumns = kTileVectors * Vec<T>::width;
// Columns of C in a block, and how many it may have at most (column_block in gemm.h).
template <class T>
inline constexpr int64_t kColumnBlock = 2048 / sizeof(T) / kTileColumns<T> * kTileColumns<T>;
template <class T>
inline constexpr int64_t kMostColumns = 2 * kColumnBlock<T>;

// Rows of C in as few tiles as may be, of nearly the same size.
struct RowTiles {
  Range rows;
  int64_t count;

  explicit RowTiles(Range rows) : rows(rows), count((rows.size() + kTileRows - 1) / kTileRows) {}

  Range of(int64_t tile) const {
    const Range within = split(rows.size(), 1, tile, count);
    return {rows.begin + within.begin, rows.begin + within.end};
  }
};

// One block of K for one tile of C.
template <class T>
struct Tile {
  int64_t K;
  const T* a;
  int64_t a_stride, a_k_stride;  // between rows of the tile, and steps of K
  const T* b;
  int64_t ldb;  // between steps of K; of dot products, between columns of C
  T* c;
  int64_t ldc;
  // Added to the block's own sum, or null: the bias (ldadd 0) to the first block, C so far to the others. A block sums
  // from 0, so that no chain of additions is longer than a block.
  const T* add;
  int64_t ldadd;
  bool relu;         // after the last block
  bool one = false;  // add is a single number; of a single row
  int last = 0;      // lanes of the last vector that lie inside C; of outer products
};

template <class T, int N, bool partial>
MNIST_EXT_INLINE Vec<T> load_column(const T* row, int v, int last) {
  const T* p = row + v * Vec<T>::width;
  return partial && v == N - 1 ? Vec<T>::load_partial(p, last) : Vec<T>::load(p);
}

template <class T, int R, int N, bool partial>
MNIST_EXT_INLINE void accumulate_tile(const Tile<T>& t, Vec<T> (&acc)[R][N]) {
  using V = Vec<T>;
  const T* a[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) a[r] = t.a + r * t.a_stride;
  const T* b = t.b;
  for (int64_t p = 0; p < t.K; ++p) {
    V bv[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) bv[v] = load_column<T, N, partial>(b, v, t.last);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V ar = V::broadcast(a[r][p * t.a_k_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) acc[r][v] = fma(ar, bv[v], acc[r][v]);
    }
    b += t.ldb;
  }
}

// body(r, v) for each vector of a tile; unrolled, so that what it indexes may stay in registers.
template <int R, int N, class Body>
MNIST_EXT_INLINE void for_each_of_tile(const Body& body) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) body(r, v);
  }
}

template <class T, int R, int N, bool partial>
void compute_tile(const Tile<T>& t) {
  using V = Vec<T>;
  T* const c = t.c;  // a copy, which the stores to C do not overwrite
  const int64_t ldc = t.ldc;
  for_each_of_tile<R, N>([&](int r, int v) __attribute__((always_inline)) {
    __builtin_prefetch(c + r * ldc + v * V::width);  // C comes from far while the sums are made
  });
  V acc[R][N] = {};
  accumulate_tile<T, R, N, partial>(t, acc);
  if (R == 1 && t.one) {
    for_each_of_tile<R, N>([&](int r, int v)
                               __attribute__((always_inline)) { acc[r][v] = acc[r][v] + V::broadcast(*t.add); });
  } else if (t.add) {
    for_each_of_tile<R, N>([&](int r, int v) __attribute__((always_inline)) {
      acc[r][v] = acc[r][v] + load_column<T, N, partial>(t.add + r * t.ldadd, v, t.last);
    });
  }
  if (t.relu) {
    for_each_of_tile<R, N>([&](int r, int v)
                               __attribute__((always_inline)) { acc[r][v] = max(V{}, acc[r][v]); });  // NaN stays NaN
  }
  const int last = t.last;
  for_each_of_tile<R, N>([&](int r, int v) __attribute__((always_inline)) {
    T* const to = c + r * ldc + v * V::width;
    if (partial && v == N - 1) {
      acc[r][v].store_partial(to, last);
    } else {
      acc[r][v].store(to);
    }
  });
}

// The shape of a tile, known to the compiler.
template <int R, int N, bool partial>
struct TileShape {
  static constexpr int rows = R, vectors = N;
  static constexpr bool is_partial = partial;
};

// Calls body(TileShape) for a tile of so many rows and vectors, the last of which has `last` lanes.
template <class T, int most_rows, int most_vectors, class Body>
MNIST_EXT_INLINE void with_tile_shape(int rows, int vectors, int last, const Body& body) {
  with_constant<most_rows>(rows, [&]<int R>(Constant<R>) __attribute__((always_inline)) {
    with_constant<most_vectors>(vectors, [&]<int N>(Constant<N>) __attribute__((always_inline)) {
      if (last == Vec<T>::width) {
        body(TileShape<R, N, false>{});
      } else {
        body(TileShape<R, N, true>{});
      }
    });
  });
}

template <class T>
void compute_tile(const Tile<T>& t, int rows, int vectors) {
  const auto compute = [&](auto s)
                           __attribute__((always_inline)) { compute_tile<T, s.rows, s.vectors, s.is_partial>(t); };
  if (vectors > kTileVectors) return with_tile_shape<T, 1, kRowVectors>(rows, vectors, t.last, compute);
  with_tile_shape<T, kTileRows, kTileVectors>(rows, vectors, t.last, compute);
}

}  // namespace mnist_ext::MNIST_EXT_ISA
