// C = A * B (+ bias, ReLU) by outer products, for A and B in any of the layouts that a linear layer has.
//
// A tile of C, kTileRows rows by up to kTileVectors vectors, stays in registers while the summed dimension (depth)
// runs: per step it loads its vectors of B once, broadcasts one element of A per row, and does rows * vectors
// multiply-adds. Around it: blocks of kDepthBlock steps, so that a tile's share of A stays in the first-level cache,
// and blocks of kColumnBlock columns, so that a packed block of B stays in the second. B is packed only when its
// columns are not contiguous or when it is read often enough to pay for it; A only when it is masked or transposed.
#pragma once

#include "memory.h"
#include "product.h"
#include "transpose.h"

namespace mnist_ext::MNIST_EXT_ISA {

inline constexpr int kTileRows = 6;
inline constexpr int kTileVectors = kVectorRegisters == 32 ? 4 : 2;
// Of a single row, which needs more of them at once: each multiply-add waits for the one before it in its vector.
inline constexpr int kRowVectors = 8;
template <class T>
inline constexpr int64_t kTileColumns = kTileVectors * Vec<T>::width;
template <class T>
inline constexpr int64_t kColumnBlock = 2048 / sizeof(T) / kTileColumns<T> * kTileColumns<T>;
// Pack B when each of its elements is read by at least this many row tiles.
inline constexpr int64_t kPackFromTiles = 16;

// One block of the summed dimension for one tile of C.
template <class T>
struct Tile {
  const T* a;
  int64_t a_row, a_depth;
  const T* b;
  int64_t b_depth;
  int64_t depth;
  T* c;
  int64_t c_row;
  int last;  // lanes of the last vector that lie inside C
  // Added to the block's own sum, or null: the bias (add_row 0) to the first block, C so far to the others. A block
  // sums from 0, so that no chain of additions is longer than a block.
  const T* add;
  int64_t add_row;
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
  for (int r = 0; r < R; ++r) a[r] = t.a + r * t.a_row;
  const T* b = t.b;
  for (int64_t p = 0; p < t.depth; ++p) {
    V bv[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) bv[v] = load_column<T, R, N, partial>(b, v, t.last);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V ar = V::broadcast(a[r][p * t.a_depth]);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) acc[r][v] = fma(ar, bv[v], acc[r][v]);
    }
    b += t.b_depth;
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
      T* p = t.c + r * t.c_row + v * V::width;
      V result = acc[r][v];
      if (R == 1 && t.one) {
        result = result + V::broadcast(*t.add);
      } else if (t.add) {
        result = result + load_column<T, R, N, partial>(t.add + r * t.add_row, v, t.last);
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

// A vector's width of lines, `stride` apart, of which `lines` exist, each contiguous along `length`: into
// [length][..], `to_stride` apart, in blocks transposed in registers. (Element by element the writes would be so far
// apart, which few sets of the first-level cache share.) Where gate, laid out alike, is <= 0, a number counts as 0.
template <class T>
void pack_transposed(const T* from, int64_t stride, const T* gate, int64_t gate_stride, int64_t lines, int64_t length,
                     T* packed, int64_t to_stride) {
  using V = Vec<T>;
  for (int64_t p = 0; p < length; p += V::width) {
    const int lanes = length - p < V::width ? static_cast<int>(length - p) : V::width;
    const auto load = [&](const T* at) __attribute__((always_inline)) {
      return lanes == V::width ? V::load(at + p) : V::load_partial(at + p, lanes);
    };
    V block[V::width];
    for (int i = 0; i < V::width; ++i) {
      block[i] = i < lines ? load(from + i * stride) : V{};
      if (gate && i < lines) block[i] = where_positive(load(gate + i * gate_stride), block[i]);
    }
    transpose(block);
    for (int i = 0; i < lanes; ++i) block[i].store(packed + (p + i) * to_stride);
  }
}

// B(depth, columns) into panels of kTileColumns columns: panel after panel, each [depth][columns], the last one filled
// up with 0.
template <class T>
void pack_b(const Product<T>& g, Range depth, Range columns, T* packed) {
  constexpr int64_t panel = kTileColumns<T>;
  for (int64_t c = columns.begin; c < columns.end; c += panel) {
    const int64_t n = columns.end - c < panel ? columns.end - c : panel;
    if (g.b_column == 1) {
      for (int64_t p = depth.begin; p < depth.end; ++p, packed += panel) {
        std::memcpy(packed, g.b + p * g.b_depth + c, n * sizeof(T));
        if (n < panel) std::memset(packed + n, 0, (panel - n) * sizeof(T));
      }
    } else {
      for (int64_t j = 0; j < panel; j += Vec<T>::width) {
        pack_transposed<T>(g.b + (c + j) * g.b_column + depth.begin, g.b_column, nullptr, 0, n - j, depth.size(),
                           packed + j, panel);
      }
      packed += depth.size() * panel;
    }
  }
}

// (Gated) A(rows, depth) along its rows: [rows][depth], `stride` apart. Stores whole vectors.
template <class T>
void pack_a_rows(const Product<T>& g, Range rows, Range depth, T* packed, int64_t stride) {
  using V = Vec<T>;
  const T* a = g.a + rows.begin * g.a_row + depth.begin * g.a_depth;
  const T* gate = g.a_gate ? g.a_gate + rows.begin * g.gate_row + depth.begin * g.gate_depth : nullptr;
  if (g.a_is_transposed()) {
    for (int64_t p = 0; p < depth.size(); p += V::width) {
      pack_transposed(a + p * g.a_depth, g.a_depth, gate ? gate + p * g.gate_depth : nullptr, g.gate_depth,
                      depth.size() - p, rows.size(), packed + p, stride);
    }
    return;
  }
  for (int64_t r = 0; r < rows.size(); ++r, a += g.a_row, gate += g.gate_row, packed += stride) {
    for_each_vector<T>(depth.size(), [&](int64_t p, int lanes) __attribute__((always_inline)) {
      where_positive(load(gate + p, lanes), load(a + p, lanes)).store(packed + p);
    });
  }
}

// (Gated) A(row.., depth) for a tile, if it is transposed: [depth][kTileRows]. Stores whole vectors, what lies beyond
// the tile's rows to be overwritten by the next step.
template <class T>
void pack_a_columns(const Product<T>& g, int64_t row, int rows, Range depth, T* packed) {
  using V = Vec<T>;
  constexpr int vectors = (kTileRows + V::width - 1) / V::width;
  for (int64_t p = depth.begin; p < depth.end; ++p, packed += kTileRows) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const int lanes = rows - v * V::width < V::width ? rows - v * V::width : V::width;
      if (lanes <= 0) break;
      V x = V::load_partial(g.a + row + v * V::width + p * g.a_depth, lanes);
      if (g.a_gate) {
        x = where_positive(V::load_partial(g.a_gate + row + v * V::width + p * g.gate_depth, lanes), x);
      }
      x.store(packed + v * V::width);
    }
  }
}

// The product for a depth of 1, without bias or ReLU: one row of C after the other, which is all that there is to it.
template <class T>
void outer_product(const Product<T>& g) {
  using V = Vec<T>;
  for (int64_t row = 0; row < g.rows; ++row) {
    const T a = g.a_gate && g.a_gate[row * g.gate_row] <= T(0) ? T(0) : g.a[row * g.a_row];
    const V factor = V::broadcast(a);
    T* c = g.c + row * g.c_row;
    for_each_vector<T>(g.columns, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      store(c + i, fma(factor, load(g.b + i, lanes), V{}), lanes);
    });
  }
}

template <class T>
T* a_tile_scratch() {
  return static_cast<T*>(scratch(Scratch::a_tile, kDepthBlock * kTileRows * sizeof(T) + kVectorBytes));
}

template <class T>
T* b_block_scratch() {
  return static_cast<T*>(scratch(Scratch::b_block, kDepthBlock * kColumnBlock<T> * sizeof(T)));
}

// All of C, on the calling thread.
template <class T>
void gemm(const Product<T>& g) {
  if (g.depth == 1 && g.b_column == 1 && !g.bias && !g.relu) return outer_product(g);
  constexpr int64_t panel = kTileColumns<T>;
  const int64_t row_tiles = (g.rows + kTileRows - 1) / kTileRows;
  const bool packs_a = g.packs_a();
  const bool packs_b = g.b_column != 1 || row_tiles >= kPackFromTiles;
  T* a_tile = packs_a ? a_tile_scratch<T>() : nullptr;
  T* b_block = packs_b ? b_block_scratch<T>() : nullptr;

  int64_t p = 0;
  do {  // once for depth 0 too: C is then bias or 0
    const Range depth = {p, g.depth - p < kDepthBlock ? g.depth : p + kDepthBlock};
    const bool first = p == 0, last = depth.end == g.depth;
    for (int64_t block = 0; block < g.columns; block += kColumnBlock<T>) {
      const int64_t block_end = g.columns - block < kColumnBlock<T> ? g.columns : block + kColumnBlock<T>;
      if (packs_b) pack_b(g, depth, {block, block_end}, b_block);
      for (int64_t tile = 0; tile < row_tiles; ++tile) {
        const Range rows = split(g.rows, 1, tile, row_tiles);
        const int64_t row = rows.begin;
        const int tile_size = static_cast<int>(rows.size());
        Tile<T> t;
        t.depth = depth.size();
        t.relu = last && g.relu;
        t.c_row = g.c_row;
        if (packs_a) {
          t.a = a_tile;
          if (g.a_is_transposed()) {
            pack_a_columns(g, row, tile_size, depth, a_tile);
            t.a_row = 1;
            t.a_depth = kTileRows;
          } else {
            pack_a_rows(g, rows, depth, a_tile, kDepthBlock);
            t.a_row = kDepthBlock;
            t.a_depth = 1;
          }
        } else {
          t.a = g.a + row * g.a_row + depth.begin * g.a_depth;
          t.a_row = g.a_row;
          t.a_depth = g.a_depth;
        }
        const int64_t width = tile_size == 1 && !packs_b ? kRowVectors * Vec<T>::width : panel;
        const T* packed = b_block;
        for (int64_t column = block; column < block_end; column += width, packed += depth.size() * panel) {
          const int64_t n = block_end - column < width ? block_end - column : width;
          const int vectors = static_cast<int>((n + Vec<T>::width - 1) / Vec<T>::width);
          t.b = packs_b ? packed : g.b + depth.begin * g.b_depth + column;
          t.b_depth = packs_b ? panel : g.b_depth;
          t.c = g.c + row * g.c_row + column;
          t.one = first && g.one_bias && g.bias;
          t.add = first ? (g.bias && !t.one ? g.bias + column : g.bias) : t.c;
          t.add_row = first ? 0 : g.c_row;
          t.last = static_cast<int>(n - (vectors - 1) * Vec<T>::width);
          compute_tile(t, tile_size, vectors);
        }
      }
    }
    p = depth.end;
  } while (p < g.depth);
}

}  // namespace mnist_ext::MNIST_EXT_ISA
