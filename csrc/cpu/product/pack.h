// Copies of operands as the kernels read them best.
#pragma once

#include "../simd/elements.h"
#include "block.h"
#include "tile.h"

namespace mnist_ext::MNIST_EXT_ISA {

// A vector's width of lines, `stride` apart, of which `lines` exist, each contiguous along `length`: into
// [length][..], `to_stride` apart, in blocks transposed in registers. (Element by element the writes would be so far
// apart, which few sets of the first-level cache share.) Where mask, laid out alike, is <= 0, a number counts as 0.
template <class T>
void pack_transposed(const T* from, int64_t stride, const T* mask, int64_t mask_stride, int64_t lines, int64_t length,
                     T* packed, int64_t to_stride) {
  using V = Vec<T>;
  int64_t p = 0;
  for (; lines >= V::width && !mask && length - p >= V::width; p += V::width) {  // all of it in registers
    V block[V::width];
#pragma GCC unroll 16
    for (int i = 0; i < V::width; ++i) block[i] = V::load(from + i * stride + p);
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < V::width; ++i) block[i].store(packed + (p + i) * to_stride);
  }
  for (; p < length; p += V::width) {
    const int lanes = length - p < V::width ? static_cast<int>(length - p) : V::width;
    V block[V::width];
    for (int i = 0; i < V::width; ++i) {
      block[i] = i < lines ? load(from + i * stride + p, lanes) : V{};
      if (mask && i < lines) block[i] = where_positive(load(mask + i * mask_stride + p, lanes), block[i]);
    }
    transpose(block);
    for (int i = 0; i < lanes; ++i) block[i].store(packed + (p + i) * to_stride);
  }
}

// Those steps of K of B into panels of kTileColumns columns: panel after panel, each [k][columns], the last one filled
// up with 0. Contiguous columns are read row by row, which the processor's prefetcher follows.
template <class T>
void pack_b(const Block<T>& g, Range k, Range columns, T* packed) {
  using V = Vec<T>;
  constexpr int64_t panel = kTileColumns<T>;
  const int64_t panel_size = k.size() * panel;
  if (g.b.outer_stride == 1) {
    for (int64_t p = k.begin; p < k.end; ++p, packed += panel) {
      const T* row = g.b.data + p * g.b.k_stride;
      T* to = packed;
      int64_t c = columns.begin;
      for (; columns.end - c >= panel; c += panel, to += panel_size) {
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) V::load(row + c + v * V::width).store(to + v * V::width);
      }
      if (c == columns.end) continue;
      for (int v = 0; v < kTileVectors; ++v, c += V::width) {
        const int64_t lanes = columns.end - c < V::width ? columns.end - c : V::width;
        (lanes > 0 ? load(row + c, static_cast<int>(lanes)) : V{}).store(to + v * V::width);
      }
    }
    return;
  }
  for (int64_t c = columns.begin; c < columns.end; c += panel, packed += panel_size) {
    for (int64_t j = 0; j < panel; j += V::width) {
      pack_transposed<T>(g.b.data + (c + j) * g.b.outer_stride + k.begin, g.b.outer_stride, nullptr, 0,
                         columns.end - c - j, k.size(), packed + j, panel);
    }
  }
}

// A behind its mask, along its rows: [rows][k], `stride` apart. Stores whole vectors.
template <class T>
void pack_a_rows(const Block<T>& g, Range rows, Range k, T* packed, int64_t stride) {
  using V = Vec<T>;
  const T* a = g.a.data + rows.begin * g.a.outer_stride + k.begin * g.a.k_stride;
  const T* mask = g.relu_mask.data
                      ? g.relu_mask.data + rows.begin * g.relu_mask.outer_stride + k.begin * g.relu_mask.k_stride
                      : nullptr;
  if (g.a_is_transposed()) {
    for (int64_t p = 0; p < k.size(); p += V::width) {
      pack_transposed(a + p * g.a.k_stride, g.a.k_stride, mask ? mask + p * g.relu_mask.k_stride : nullptr,
                      g.relu_mask.k_stride, k.size() - p, rows.size(), packed + p, stride);
    }
    return;
  }
  for (int64_t r = 0; r < rows.size(); ++r, a += g.a.outer_stride, mask += g.relu_mask.outer_stride, packed += stride) {
    for_each_vector<T>(k.size(), [&](int64_t p, int lanes) __attribute__((always_inline)) {
      where_positive(load(mask + p, lanes), load(a + p, lanes)).store(packed + p);
    });
  }
}

// Tiles of A that are packed at once, so that most of a cache line is read by one of its loads after the other.
inline constexpr int kTilesTogether = 4;
// Of a packed tile: kTileRows and padding, so that a step's store straddles no cache line.
inline constexpr int kPackedRows = 8;

template <class T, int count, bool masked>
void pack_a_tiles(const Block<T>& g, const RowTiles& tiles, int64_t first, Range k, T* packed, int64_t tile_size) {
  using V = Vec<T>;
  constexpr int vectors = (kTileRows + V::width - 1) / V::width;
  int64_t row[count];
  int lanes[count][vectors];
  for (int i = 0; i < count; ++i) {
    const Range rows = tiles.of(first + i);
    row[i] = rows.begin;
    for (int v = 0; v < vectors; ++v) {
      const int64_t left = rows.size() - v * V::width;
      lanes[i][v] = static_cast<int>(left < V::width ? left : V::width);
    }
  }
  const int64_t a_stride = g.a.k_stride, mask_stride = g.relu_mask.k_stride;
  const T* a = g.a.data + k.begin * a_stride;
  const T* mask = masked ? g.relu_mask.data + k.begin * mask_stride : nullptr;
  for (int64_t p = k.begin; p < k.end; ++p, a += a_stride, packed += kPackedRows) {
    V step[count][vectors] = {};  // GCC does not see that what is stored was loaded
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        if (lanes[i][v] <= 0) break;
        const int64_t at = row[i] + v * V::width;
        step[i][v] = V::load_partial(a + at, lanes[i][v]);
        if (masked) step[i][v] = where_positive(V::load_partial(mask + at, lanes[i][v]), step[i][v]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        constexpr int room = kPackedRows < V::width ? kPackedRows : V::width;
        step[i][v].store_partial(packed + i * tile_size + v * V::width, room);
      }
    }
    if (masked) mask += mask_stride;
  }
}

// A behind its mask, if it is read along its columns, for kTilesTogether tiles, or as many as there are from the first
// on: [tile][k][kPackedRows], the tiles tile_size apart. What lies beyond a tile's rows is of no meaning.
template <class T>
void pack_a_columns(const Block<T>& g, const RowTiles& tiles, int64_t first, Range k, T* packed, int64_t tile_size) {
  const int64_t left = tiles.count - first;
  const int together = left < kTilesTogether ? static_cast<int>(left) : kTilesTogether;
  with_constant<kTilesTogether>(together, [&]<int count>(Constant<count>) {
    if (g.relu_mask.data) {
      pack_a_tiles<T, count, true>(g, tiles, first, k, packed, tile_size);
    } else {
      pack_a_tiles<T, count, false>(g, tiles, first, k, packed, tile_size);
    }
  });
}

}  // namespace mnist_ext::MNIST_EXT_ISA
