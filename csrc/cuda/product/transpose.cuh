// A matrix copied so that the other index lies side by side in memory.
#pragma once

#include "../device/device.cuh"
#include "tiles.cuh"

namespace mnist_ext::cuda {

inline constexpr int kTransposeSide = 32;
inline constexpr int kTransposeThreads = 256;

// to[c * to_stride + r] = from[r * from_stride + c]: through shared memory, so that warps read and write side by side.
// Grid: any.
template <class T>
__global__ void __launch_bounds__(kTransposeThreads)
    transpose_kernel(const T* from, int64_t rows, int64_t columns, int64_t from_stride, T* to, int64_t to_stride) {
  constexpr int kSide = kTransposeSide, kRowsAtOnce = kTransposeThreads / kSide;
  constexpr int kPitch = kSide + 1;  // so that a column of the tile meets each bank once
  T* tile = reinterpret_cast<T*>(shared_memory());
  const int64_t column_tiles = tiles_of(columns, kSide), tiles = tiles_of(rows, kSide) * column_tiles;
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const int64_t row = i / column_tiles * kSide, column = i % column_tiles * kSide;
#pragma unroll
    for (int j = y; j < kSide; j += kRowsAtOnce) {
      if (row + j < rows && column + x < columns) tile[j * kPitch + x] = from[(row + j) * from_stride + column + x];
    }
    __syncthreads();
#pragma unroll
    for (int j = y; j < kSide; j += kRowsAtOnce) {
      if (column + j < columns && row + x < rows) to[(column + j) * to_stride + row + x] = tile[x * kPitch + j];
    }
    __syncthreads();
  }
}

template <class T>
void transpose(const T* from, int64_t rows, int64_t columns, int64_t from_stride, T* to, int64_t to_stride,
               cudaStream_t stream) {
  constexpr int64_t kMostBlocks = 1 << 16;
  const int64_t tiles = tiles_of(rows, kTransposeSide) * tiles_of(columns, kTransposeSide);
  const Shape shape = {static_cast<unsigned>(tiles < kMostBlocks ? tiles : kMostBlocks), kTransposeThreads, 1,
                       kTransposeSide * (kTransposeSide + 1) * static_cast<int64_t>(sizeof(T))};
  launch("transpose", transpose_kernel<T>, shape, stream, from, rows, columns, from_stride, to, to_stride);
}

}  // namespace mnist_ext::cuda
