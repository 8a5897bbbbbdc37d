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
  for (int64_t p = 0; p < length; p += V::width) {
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
// up with 0.
template <class T>
void pack_b(const Block<T>& g, Range k, Range columns, T* packed) {
  constexpr int64_t panel = kTileColumns<T>;
  for (int64_t c = columns.begin; c < columns.end; c += panel) {
    const int64_t n = columns.end - c < panel ? columns.end - c : panel;
    if (g.b.outer_stride == 1) {
      for (int64_t p = k.begin; p < k.end; ++p, packed += panel) {
        std::memcpy(packed, g.b.data + p * g.b.k_stride + c, n * sizeof(T));
        if (n < panel) std::memset(packed + n, 0, (panel - n) * sizeof(T));
      }
    } else {
      for (int64_t j = 0; j < panel; j += Vec<T>::width) {
        pack_transposed<T>(g.b.data + (c + j) * g.b.outer_stride + k.begin, g.b.outer_stride, nullptr, 0, n - j,
                           k.size(), packed + j, panel);
      }
      packed += k.size() * panel;
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

// A behind its mask for a tile, if it is transposed: [k][kTileRows]. Stores whole vectors, what lies beyond
// the tile's rows to be overwritten by the next step.
template <class T>
void pack_a_columns(const Block<T>& g, int64_t row, int rows, Range k, T* packed) {
  using V = Vec<T>;
  constexpr int vectors = (kTileRows + V::width - 1) / V::width;
  for (int64_t p = k.begin; p < k.end; ++p, packed += kTileRows) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const int lanes = rows - v * V::width < V::width ? rows - v * V::width : V::width;
      if (lanes <= 0) break;
      V x = V::load_partial(g.a.data + row + v * V::width + p * g.a.k_stride, lanes);
      if (g.relu_mask.data) {
        x = where_positive(V::load_partial(g.relu_mask.data + row + v * V::width + p * g.relu_mask.k_stride, lanes), x);
      }
      x.store(packed + v * V::width);
    }
  }
}

}  // namespace mnist_ext::MNIST_EXT_ISA
