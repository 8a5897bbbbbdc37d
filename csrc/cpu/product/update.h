// The update epilogue: C is the gradient of a parameter, which is updated tile by tile, so that C is never written.
#pragma once

#include "../sgd.h"
#include "plan.h"

namespace mnist_ext::MNIST_EXT_ISA {

// param -= lr * the tile's products, or what the options make of it. t.c: the parameter's tile.
template <class T, int R, int N, bool partial>
void update_tile(const Tile<T>& t, T* buffer, const SgdUpdate<T>& sgd) {
  using V = Vec<T>;
  for_each_of_tile<R, N>([&](int r, int v)
                             __attribute__((always_inline)) { prefetch(t.c + r * t.ldc + v * V::width); });
  V acc[R][N] = {};
  accumulate_tile<T, R, N, partial>(t, acc);
  if (!partial && !buffer && sgd.options.weight_decay == 0 && !sgd.options.maximize) {  // in registers
    for_each_of_tile<R, N>([&](int r, int v) __attribute__((always_inline)) {
      T* p = t.c + r * t.ldc + v * V::width;
      fma(acc[r][v], sgd.minus_lr, V::load(p)).store(p);
    });
    return;
  }
  V gradient[R][N];
  for_each_of_tile<R, N>([&](int r, int v)
                             __attribute__((always_inline)) { gradient[r][v] = uncontracted(acc[r][v]); });
#pragma GCC unroll 1
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 1
    for (int v = 0; v < N; ++v) {
      const int64_t i = r * t.ldc + v * V::width;
      sgd(t.c + i, gradient[r][v], buffer ? buffer + i : nullptr, partial && v == N - 1 ? t.last : V::width);
    }
  }
}

template <class T>
T* packed_a_scratch(int64_t rows, int64_t K) {
  const std::size_t size = static_cast<std::size_t>(RowTiles({0, rows}).count * K * kPackedRows);
  return static_cast<T*>(scratch(Scratch::packed_a, size * sizeof(T)));
}

// Of those rows and columns of a gradient that sums over at most kBlockK examples. A column of tiles after the other:
// its part of B stays in the first-level cache, and A, packed once, passes by. A is transposed.
template <class T>
void update_from_tiles(const Product<T>& p, Range m, Range n) {
  constexpr int width = Vec<T>::width;
  const Block<T> g(p);
  const SgdUpdate<T> sgd(p.update.options);
  const RowTiles tiles(m);
  const int64_t tile_size = p.K * kPackedRows;
  T* packed = packed_a_scratch<T>(m.size(), p.K);
  for (int64_t tile = 0; tile < tiles.count; tile += kTilesTogether) {
    pack_a_columns(g, tiles, tile, {0, p.K}, packed + tile * tile_size, tile_size);
  }
  for (int64_t column = n.begin; column < n.end; column += kTileColumns<T>) {
    const int64_t columns = n.end - column < kTileColumns<T> ? n.end - column : kTileColumns<T>;
    const int vectors = static_cast<int>((columns + width - 1) / width);
    for (int64_t tile = 0; tile < tiles.count; ++tile) {
      const Range rows = tiles.of(tile);
      const int64_t offset = rows.begin * p.N + column;
      const Tile<T> t = {.K = p.K,
                         .a = packed + tile * tile_size,
                         .a_stride = 1,
                         .a_k_stride = kPackedRows,
                         .b = p.b.data + column,
                         .ldb = p.b.k_stride,
                         .c = p.update.param + offset,
                         .ldc = p.N,
                         .add = nullptr,
                         .ldadd = 0,
                         .relu = false,
                         .last = static_cast<int>(columns - (vectors - 1) * width)};
      T* buffer = p.update.momentum_buffer ? p.update.momentum_buffer + offset : nullptr;
      const auto update = [&](auto s) __attribute__((always_inline)) {
        update_tile<T, s.rows, s.vectors, s.is_partial>(t, buffer, sgd);
      };
      with_tile_shape<T, kTileRows, kTileVectors>(static_cast<int>(rows.size()), vectors, t.last, update);
    }
  }
}

#if defined(MNIST_EXT_AMX)
inline void update_by_amx(const Product<float>& p, Range m, Range n) {
  const SgdUpdate<float> sgd(p.update.options);
  for_each_amx_block(
      Block<float>(p), m, n,
      [&](const auto& sums, Range rows, Range columns, Range) {
        for_each_sum(sums, rows, columns, [&](int64_t row, int64_t column, Vec<float> gradient, int lanes) {
          const int64_t at = row * p.N + column;
          sgd(p.update.param + at, gradient, p.update.momentum_buffer ? p.update.momentum_buffer + at : nullptr, lanes);
        });
      },
      [&](Range rows, Range columns, Range) { update_from_tiles(p, rows, columns); });
}
#endif

// That part of C, and of the parameter it updates.
template <class T>
void update_part(const Product<T>& p, Range m, Range n) {
  if (m.size() == 0 || n.size() == 0) return;
#if defined(MNIST_EXT_AMX)
  if constexpr (std::is_same_v<T, float>) {
    if (!p.c && use_amx<T>(p.M, p.N, p.K)) return update_by_amx(p, m, n);
  }
#endif
  if (!p.c) return update_from_tiles(p, m, n);
  product_part(Block<T>(p), m, n);
  const SgdTensor<T> tensor = {p.M * p.N, p.update.param, p.c, p.update.momentum_buffer};
  for (int64_t row = m.begin; row < m.end; ++row) {
    sgd_range(tensor, p.update.options, {row * p.N + n.begin, row * p.N + n.end});
  }
}

}  // namespace mnist_ext::MNIST_EXT_ISA
