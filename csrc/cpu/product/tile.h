// The register tile: kTileRows rows of C by up to kTileVectors vectors stay in registers while K runs. Each step loads
// its vectors of B once, broadcasts one element of A per row, and does rows * vectors multiply-adds.
#pragma once

#include "../simd/vec.h"

namespace mnist_ext::MNIST_EXT_ISA {

inline constexpr int kTileRows = 6;
inline constexpr int kTileVectors = kVectorRegisters == 32 ? 4 : 2;
// Of a single row, which needs more of them at once: each multiply-add waits for the one before it in its vector.
inline constexpr int kRowVectors = 8;
template <class T>
inline constexpr int64_t kTileColumns = kTileVectors * Vec<T>::width;
template <class T>
inline constexpr int64_t kColumnBlock = 2048 / sizeof(T) / kTileColumns<T> * kTileColumns<T>;
// One block of K for one tile of C.
template <class T>
struct Tile {
  int64_t K;
  const T* a;
  int64_t a_stride, a_k_stride;  // between rows of the tile, and steps of K
  const T* b;
  int64_t ldb;  // between steps of K
  T* c;
  int64_t ldc;
  int last;  // lanes of the last vector that lie inside C
  // Added to the block's own sum, or null: the bias (ldadd 0) to the first block, C so far to the others. A block sums
  // from 0, so that no chain of additions is longer than a block.
  const T* add;
  int64_t ldadd;
  bool relu;         // after the last block
  bool one = false;  // add is a single number; of a single row
};

template <class T, int R, int N, bool partial>
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
    for (int v = 0; v < N; ++v) bv[v] = load_column<T, R, N, partial>(b, v, t.last);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V ar = V::broadcast(a[r][p * t.a_k_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) acc[r][v] = fma(ar, bv[v], acc[r][v]);
    }
    b += t.ldb;
  }
}

template <class T, int R, int N, bool partial>
void compute_tile(const Tile<T>& t) {
  using V = Vec<T>;
  V acc[R][N] = {};
  accumulate_tile<T, R, N, partial>(t, acc);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
      T* p = t.c + r * t.ldc + v * V::width;
      V result = acc[r][v];
      if (R == 1 && t.one) {
        result = result + V::broadcast(*t.add);
      } else if (t.add) {
        result = result + load_column<T, R, N, partial>(t.add + r * t.ldadd, v, t.last);
      }
      if (t.relu) result = max(V{}, result);  // NaN stays NaN
      if (partial && v == N - 1) {
        result.store_partial(p, t.last);
      } else {
        result.store(p);
      }
    }
  }
}

// The shape of a tile, known to the compiler.
template <int R, int N, bool partial>
struct TileShape {
  static constexpr int rows = R, vectors = N;
  static constexpr bool is_partial = partial;
};

// Calls body(TileShape) for a tile of R rows and so many vectors, at most `most`, the last of which has `last` lanes.
template <class T, int R, int most, class Body>
MNIST_EXT_INLINE void with_tile_vectors(int vectors, int last, const Body& body) {
  if constexpr (most > 1) {
    if (vectors < most) return with_tile_vectors<T, R, most - 1>(vectors, last, body);
  }
  if (last == Vec<T>::width) {
    body(TileShape<R, most, false>{});
  } else {
    body(TileShape<R, most, true>{});
  }
}

template <class T, class Body>
MNIST_EXT_INLINE void with_tile_shape(int rows, int vectors, int last, const Body& body) {
  switch (rows) {
    case 1: return with_tile_vectors<T, 1, kTileVectors>(vectors, last, body);
    case 2: return with_tile_vectors<T, 2, kTileVectors>(vectors, last, body);
    case 3: return with_tile_vectors<T, 3, kTileVectors>(vectors, last, body);
    case 4: return with_tile_vectors<T, 4, kTileVectors>(vectors, last, body);
    case 5: return with_tile_vectors<T, 5, kTileVectors>(vectors, last, body);
    default: return with_tile_vectors<T, 6, kTileVectors>(vectors, last, body);
  }
}

template <class T>
void compute_tile(const Tile<T>& t, int rows, int vectors) {
  if (vectors > kTileVectors) {
    return with_tile_vectors<T, 1, kRowVectors>(vectors, t.last, [&](auto s) __attribute__((always_inline)) {
      compute_tile<T, 1, s.vectors, s.is_partial>(t);
    });
  }
  with_tile_shape<T>(rows, vectors, t.last, [&](auto s) __attribute__((always_inline)) {
    compute_tile<T, s.rows, s.vectors, s.is_partial>(t);
  });
}

}  // namespace mnist_ext::MNIST_EXT_ISA
