// How a product is cut into tiles.
#pragma once

#include "../device/device.cuh"
#include "../../api/product.h"

namespace mnist_ext::cuda {

// Which index of an operand has neighbours side by side in memory.
enum class Major { outer, depth };

template <class T>
Major major_of(const Operand<T>& operand) {
  return operand.outer_stride == 1 && operand.k_stride != 1 ? Major::outer : Major::depth;
}

__host__ __device__ inline int64_t tiles_of(int64_t size, int64_t side) { return (size + side - 1) / side; }

inline constexpr int64_t kMostTiles = 0x7fffffff;  // of a product: blocks of a grid

struct TilePosition {
  int row, column;  // in tiles
};

// Tiles that run at the same time share rows and columns, which the L2 cache then holds: bands of eight tiles of rows,
// and through each column by column.
__device__ inline TilePosition tile_position(int i, int row_tiles, int column_tiles) {
  constexpr int kBand = 8;
  if (row_tiles <= kBand) return {i % row_tiles, i / row_tiles};
  const int band = i / column_tiles / kBand, in_band = i - band * kBand * column_tiles;
  const int height = row_tiles - band * kBand < kBand ? row_tiles - band * kBand : kBand;
  return {band * kBand + in_band % height, in_band / height};
}

}  // namespace mnist_ext::cuda
