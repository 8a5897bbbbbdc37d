// C = A * B^T (+ bias, ReLU) by outer products, for A and B in any of the layouts that a linear layer has.
//
// Around the register tile: blocks of kBlockK steps of K, so that a tile's share of A stays in the first-level cache,
// and blocks of columns (column_block), so that a packed block of B stays in the second. B is packed only when its
// columns are not contiguous or when it is read often enough to pay for it; A only when it is masked, or when it is
// read along its columns and the same holds.
#pragma once

#include <unistd.h>

#include "pack.h"

namespace mnist_ext::MNIST_EXT_ISA {

// Whether lines that lie `stride` elements apart share a set of the first-level cache, which holds a dozen of them.
template <class T>
bool is_aliased(int64_t stride) {
  return stride * static_cast<int64_t>(sizeof(T)) % 4096 == 0;
}

// Whether to pack B: when each of its elements is read by so many row tiles, fewer where its vectors straddle lines or
// its rows are aliased, which is not so in the copy. Measured by benchmarks/products.py, as below, on Intel.
template <class T>
bool pays_to_pack_b(const Block<T>& g, int64_t row_tiles) {
  const bool aligned = g.b.k_stride % Vec<T>::width == 0 && reinterpret_cast<uintptr_t>(g.b.data) % kVectorBytes == 0;
  return row_tiles >= (aligned && !is_aliased<T>(g.b.k_stride) ? 23 : 11);
}

// Whether to pack A, which is read along its columns, a line for each step of K: where the lines do not stay in the
// first-level cache, and are read by many panels of B.
template <class T>
bool pays_to_pack_a(const Block<T>& g) {
  return is_aliased<T>(g.a.k_stride) || (g.K > 128 && g.N > 2 * kTileColumns<T>);
}

// The product for K = 1, without bias or ReLU: one row of C after the other, which is all that there is to it.
template <class T>
void outer_product(const Block<T>& g) {
  using V = Vec<T>;
  for (int64_t row = 0; row < g.M; ++row) {
    const T a = g.relu_mask.data && g.relu_mask.data[row * g.relu_mask.outer_stride] <= T(0)
                    ? T(0)
                    : g.a.data[row * g.a.outer_stride];
    const V factor = V::broadcast(a);
    T* c = g.c + row * g.ldc;
    for_each_vector<T>(g.N, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      store(c + i, fma(factor, load(g.b.data + i, lanes), V{}), lanes);
    });
  }
}

// A line more, so that the same step of all tiles packed together is not in the same set of the first-level cache.
template <class T>
inline constexpr int64_t kPackedTile = kBlockK * kPackedRows + 64 / sizeof(T);

template <class T>
T* a_tiles_scratch() {
  return static_cast<T*>(scratch(Scratch::a_tiles, kTilesTogether * kPackedTile<T> * sizeof(T)));
}

template <class T>
T* b_block_scratch() {
  return static_cast<T*>(scratch(Scratch::b_block, kBlockK * kMostColumns<T> * sizeof(T)));
}

// Columns of B that are packed at once: 512 KB of them, half of a small second-level cache. Where A is packed anew for
// each block of columns, twice as many if there is room (N = 768 on Intel: 1.04 times as fast).
template <class T>
int64_t column_block(bool packs_a) {
  static const bool has_room = sysconf(_SC_LEVEL2_CACHE_SIZE) >= 2 << 20;  // 0 where it is not known
  return packs_a && has_room ? kMostColumns<T> : kColumnBlock<T>;
}

// All of C, on the calling thread.
template <class T>
void gemm(const Block<T>& g) {
  if (g.K == 1 && g.b.outer_stride == 1 && !g.bias && !g.relu && !g.accumulate) return outer_product(g);
  constexpr int64_t panel = kTileColumns<T>;
  const RowTiles tiles({0, g.M});
  const bool packs_a = g.relu_mask.data || (g.a_is_transposed() && pays_to_pack_a(g));
  const bool packs_b = g.b.outer_stride != 1 || pays_to_pack_b(g, tiles.count);
  const int64_t block_size = column_block<T>(packs_a);
  T* a_tiles = packs_a ? a_tiles_scratch<T>() : nullptr;
  T* b_block = packs_b ? b_block_scratch<T>() : nullptr;

  const int64_t k_blocks = g.K < 1 ? 1 : (g.K + kBlockK - 1) / kBlockK;  // one for K = 0 too: C is then bias or 0
  for (int64_t i = 0; i < k_blocks; ++i) {
    const Range k = split(g.K, Vec<T>::width, i, k_blocks);  // of nearly the same size: the shorter chain rounds less
    const bool first = i == 0 && !g.accumulate, last = k.end == g.K;
    for (int64_t block = 0; block < g.N; block += block_size) {
      const int64_t block_end = g.N - block < block_size ? g.N : block + block_size;
      if (packs_b) pack_b(g, k, {block, block_end}, b_block);
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const Range rows = tiles.of(tile);
        const int64_t row = rows.begin;
        const int tile_size = static_cast<int>(rows.size());
        Tile<T> t;
        t.K = k.size();
        t.relu = last && g.relu;
        t.ldc = g.ldc;
        if (packs_a && g.a_is_transposed()) {
          const int64_t i = tile % kTilesTogether;
          if (i == 0) pack_a_columns(g, tiles, tile, k, a_tiles, kPackedTile<T>);
          t.a = a_tiles + i * kPackedTile<T>;
          t.a_stride = 1;
          t.a_k_stride = kPackedRows;
        } else if (packs_a) {
          pack_a_rows(g, rows, k, a_tiles, kBlockK);
          t.a = a_tiles;
          t.a_stride = kBlockK;
          t.a_k_stride = 1;
        } else {
          t.a = g.a.data + row * g.a.outer_stride + k.begin * g.a.k_stride;
          t.a_stride = g.a.outer_stride;
          t.a_k_stride = g.a.k_stride;
        }
        const int64_t width = tile_size == 1 && !packs_b ? kRowVectors * Vec<T>::width : panel;
        const T* packed = b_block;
        for (int64_t column = block; column < block_end; column += width, packed += k.size() * panel) {
          const int64_t n = block_end - column < width ? block_end - column : width;
          const int vectors = static_cast<int>((n + Vec<T>::width - 1) / Vec<T>::width);
          t.b = packs_b ? packed : g.b.data + k.begin * g.b.k_stride + column;
          t.ldb = packs_b ? panel : g.b.k_stride;
          t.c = g.c + row * g.ldc + column;
          t.one = first && g.one_bias && g.bias;
          t.add = first ? (g.bias && !t.one ? g.bias + column : g.bias) : t.c;
          t.ldadd = first ? 0 : g.ldc;
          t.last = static_cast<int>(n - (vectors - 1) * Vec<T>::width);
          compute_tile(t, tile_size, vectors);
        }
      }
    }
  }
}

}  // namespace mnist_ext::MNIST_EXT_ISA
