// C = A * B (+ bias, ReLU) by outer products, for A and B in any of the layouts that a linear layer has.
//
// A tile of C, kTileRows rows by up to kTileVectors vectors, stays in registers while the summed dimension (depth)
// runs: per step it loads its vectors of B once, broadcasts one element of A per row, and does rows * vectors
// multiply-adds. Around it: blocks of kDepthBlock steps, so that a tile's share of A stays in the first-level cache,
// and blocks of kColumnBlock columns, so that a packed block of B stays in the second. B is packed only when its
// columns are not contiguous or when it is read often enough to pay for it; A only when it is masked or transposed.
#pragma once

#include "../linear.h"
#include "column_sums.h"
#include "parallel.h"
#include "scratch.h"
#include "transpose.h"
#include "vec.h"

namespace mnist_ext::MNIST_EXT_ISA {

template <class T>
struct Gemm {
  int64_t rows, columns, depth;
  const T* a;                 // a(row, p) = a[row * a_row + p * a_depth]
  int64_t a_row, a_depth;     // one of them is 1:
  bool a_transposed;          // a_row is (A is read down its columns), else a_depth
  const T* b;                 // b(p, column) = b[p * b_depth + column * b_column]
  int64_t b_depth, b_column;  // one of them is 1
  T* c;                       // [rows, columns], contiguous
  const T* bias = nullptr;    // [columns], added to every row
  bool relu = false;
  const T* a_gate = nullptr;  // a(row, p) counts as 0 where a_gate(row, p) <= 0; its strides are laid out as A's
  int64_t gate_row = 0, gate_depth = 0;
  T* row_sums = nullptr;  // [rows]; with a_transposed only: the sums of (gated) A over depth
};

inline constexpr int kTileRows = 6;
inline constexpr int kTileVectors = kVectorRegisters == 32 ? 4 : 2;
// Of a single row, which needs more of them at once: each multiply-add waits for the one before it in its vector.
inline constexpr int kRowVectors = 8;
inline constexpr int64_t kDepthBlock = 256;
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
  bool relu;  // after the last block
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
      if (t.add) result = result + load_column<T, R, N, partial>(t.add + r * t.add_row, v, t.last);
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

// A vector's width of columns, of which `columns` exist, each contiguous along `depth`: into [depth][kTileColumns], in
// blocks transposed in registers. (Element by element the writes would be a panel's row apart, which few sets of the
// first-level cache share.)
template <class T>
void pack_transposed(const T* from, int64_t stride, int64_t columns, int64_t depth, T* packed) {
  using V = Vec<T>;
  for (int64_t p = 0; p < depth; p += V::width) {
    const int lanes = depth - p < V::width ? static_cast<int>(depth - p) : V::width;
    V block[V::width];
    for (int i = 0; i < V::width; ++i) {
      block[i] = i >= columns        ? V{}
                 : lanes == V::width ? V::load(from + i * stride + p)
                                     : V::load_partial(from + i * stride + p, lanes);
    }
    transpose(block);
    for (int i = 0; i < lanes; ++i) block[i].store(packed + (p + i) * kTileColumns<T>);
  }
}

// B(depth.begin..end, columns.begin..end) into panels of kTileColumns columns: panel after panel, each
// [depth][columns], the last one filled up with 0.
template <class T>
void pack_b(const Gemm<T>& g, Range depth, Range columns, T* packed) {
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
        pack_transposed(g.b + (c + j) * g.b_column + depth.begin, g.b_column, n - j, depth.size(), packed + j);
      }
      packed += depth.size() * panel;
    }
  }
}

// Gated A(row.., depth) for a tile, if it is not transposed: [kTileRows][kDepthBlock]. Stores whole vectors.
template <class T>
void pack_a_rows(const Gemm<T>& g, int64_t row, int rows, Range depth, T* packed) {
  using V = Vec<T>;
  const int64_t n = depth.size();
  for (int r = 0; r < rows; ++r, packed += kDepthBlock) {
    const T* a = g.a + (row + r) * g.a_row + depth.begin;
    const T* gate = g.a_gate + (row + r) * g.gate_row + depth.begin;
    int64_t p = 0;
    for (; p + V::width <= n; p += V::width) where_positive(V::load(gate + p), V::load(a + p)).store(packed + p);
    if (p < n) {
      const int rest = static_cast<int>(n - p);
      where_positive(V::load_partial(gate + p, rest), V::load_partial(a + p, rest)).store(packed + p);
    }
  }
}

// (Gated) A(row.., depth) for a tile, if it is transposed: [depth][kTileRows]. Stores whole vectors, what lies beyond
// the tile's rows to be overwritten by the next step.
template <class T>
void pack_a_columns(const Gemm<T>& g, int64_t row, int rows, Range depth, T* packed) {
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

// Whose column sums are the row sums of (gated) A, if it is transposed.
template <class T>
GatedRows<T> row_sums_of(const Gemm<T>& g) {
  return {g.depth, g.a, g.a_depth, g.a_gate, g.gate_depth};
}

// That part of the product for a depth of 1, without bias or ReLU: one row of C after the other, which is all that
// there is to it.
template <class T>
void outer_product(const Gemm<T>& g, Range rows, Range columns) {
  using V = Vec<T>;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T a = g.a_gate && g.a_gate[row * g.gate_row] <= T(0) ? T(0) : g.a[row * g.a_row];
    const V factor = V::broadcast(a);
    T* c = g.c + row * g.columns;
    int64_t i = columns.begin;
    for (; i + V::width <= columns.end; i += V::width) fma(factor, V::load(g.b + i), V{}).store(c + i);
    if (i < columns.end) {
      const int rest = static_cast<int>(columns.end - i);
      fma(factor, V::load_partial(g.b + i, rest), V{}).store_partial(c + i, rest);
    }
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

// Asks for all that gemm_part will ask for.
template <class T>
void reserve_gemm() {
  a_tile_scratch<T>();
  b_block_scratch<T>();
}

// The part of C in `rows` x `columns`, on the calling thread.
template <class T>
void gemm_part(const Gemm<T>& g, Range rows, Range columns) {
  if (g.depth == 1 && g.b_column == 1 && !g.bias && !g.relu) return outer_product(g, rows, columns);
  constexpr int64_t panel = kTileColumns<T>;
  const int64_t row_tiles = (rows.size() + kTileRows - 1) / kTileRows;
  const bool packs_a = g.a_gate || g.a_transposed;
  const bool packs_b = g.b_column != 1 || row_tiles >= kPackFromTiles;
  T* a_tile = packs_a ? a_tile_scratch<T>() : nullptr;
  T* b_block = packs_b ? b_block_scratch<T>() : nullptr;

  int64_t p = 0;
  do {  // once for depth 0 too: C is then bias or 0
    const Range depth = {p, g.depth - p < kDepthBlock ? g.depth : p + kDepthBlock};
    const bool first = p == 0, last = depth.end == g.depth;
    for (int64_t block = columns.begin; block < columns.end; block += kColumnBlock<T>) {
      const int64_t block_end = columns.end - block < kColumnBlock<T> ? columns.end : block + kColumnBlock<T>;
      if (packs_b) pack_b(g, depth, {block, block_end}, b_block);
      for (int64_t tile = 0; tile < row_tiles; ++tile) {
        const Range tile_rows = split(rows.size(), 1, tile, row_tiles);
        const int64_t row = rows.begin + tile_rows.begin;
        const int tile_size = static_cast<int>(tile_rows.size());
        Tile<T> t;
        t.depth = depth.size();
        t.relu = last && g.relu;
        t.c_row = g.columns;
        if (packs_a) {
          t.a = a_tile;
          if (g.a_transposed) {
            pack_a_columns(g, row, tile_size, depth, a_tile);
            t.a_row = 1;
            t.a_depth = kTileRows;
          } else {
            pack_a_rows(g, row, tile_size, depth, a_tile);
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
          t.c = g.c + row * g.columns + column;
          t.add = first ? (g.bias ? g.bias + column : nullptr) : t.c;
          t.add_row = first ? 0 : g.columns;
          t.last = static_cast<int>(n - (vectors - 1) * Vec<T>::width);
          compute_tile(t, tile_size, vectors);
        }
      }
    }
    p = depth.end;
  } while (p < g.depth);
}

// How many of `threads` to give to the rows of C, the rest to its columns: the rows, unless the busiest thread has a
// tenth less to do otherwise. Threads that share the rows of C write side by side, and each reads all of B: where that
// fits into no second-level cache, it costs as much as one more tile of rows.
template <class T>
int row_threads(const Gemm<T>& g, int threads) {
  constexpr int64_t large = int64_t{2} << 20;  // bytes
  const auto tiles = [](int64_t n, int64_t unit) { return (n + unit - 1) / unit; };
  const int64_t reading = g.depth * g.columns * static_cast<int64_t>(sizeof(T)) > large ? 1 : 0;
  int best = threads;
  double best_cost = 0;
  for (int by_row = threads; by_row >= 1; --by_row) {
    if (threads % by_row != 0) continue;
    const double cost = static_cast<double>(tiles(tiles(g.rows, kTileRows), by_row) + reading) *
                        static_cast<double>(tiles(tiles(g.columns, Vec<T>::width), threads / by_row));
    if (by_row == threads || cost < 0.9 * best_cost) {
      best = by_row;
      best_cost = cost;
    }
  }
  return best;
}

// What thread `thread` of `count` does of the whole product.
template <class T>
void gemm_share(const Gemm<T>& g, int thread, int count) {
  if (g.rows == 0) return;
  const int by_row = row_threads(g, count), by_column = count / by_row;
  const Range rows = split(g.rows, kTileRows, thread / by_column, by_row);
  const Range columns = split(g.columns, Vec<T>::width, thread % by_column, by_column);
  if (rows.size() == 0) return;
  if (columns.size() > 0) gemm_part(g, rows, columns);
  if (g.row_sums && thread % by_column == 0) column_sums(row_sums_of(g), rows, g.row_sums + rows.begin);
}

}  // namespace mnist_ext::MNIST_EXT_ISA
