// The main loop without tensor cores: each block makes a tile of C, each thread of it a small tile in registers.
//
// An operand is never turned round on its way to shared memory: it lies there along its major index, so that copies of
// 16 bytes work for every layout, and fragments are read from either form by 16-byte loads without bank conflicts. Half
// dtypes, which come here only where tensor cores cannot help, are widened when they are read, and have one layout.
#pragma once

#include "tiles.cuh"

namespace mnist_ext::cuda {

// A block's tile of C is kM x kN; a thread's, kThreadM x kThreadN of it.
template <int kM_, int kN_, int kThreadM_, int kThreadN_, int kBlocksPerSm_>
struct SimtTile {
  static constexpr int kM = kM_, kN = kN_, kThreadM = kThreadM_, kThreadN = kThreadN_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;  // at least: the registers are limited to that
  static_assert(kM / kThreadM * (kN / kThreadN) == kTileThreads);
};

template <class T>  // doubles take twice the registers
using LargeTile = SimtTile<64, 64, 8, 4, sizeof(T) == 8 ? 2 : 4>;
using SmallTile = SimtTile<32, 64, 4, 4, 4>;

// How kOuter rows of one operand lie in shared memory during one step.
template <class T, int kOuter_, Major kMajor_>
struct SimtOperandTile {
  static constexpr int kOuter = kOuter_;
  static constexpr Major kMajor = kMajor_;
  static constexpr bool kByK = kMajor == Major::k;
  static constexpr int kChunkSize = kPack<T>, kVector = kPack<ComputeType<T>>;
  static constexpr int kK = kStepBytes / sizeof(T);
  static constexpr int kRows = kByK ? kOuter : kK;
  static constexpr int kChunksOfRow = (kByK ? kK : kOuter) / kChunkSize;
  static constexpr int kBytes = kRows * kChunksOfRow * kChunk;

  // Outer-major: [K][outer]. K-major: [outer][K], changed in two ways. The lanes of a warp read the same chunk of rows
  // that are kVector apart: those rows are adjacent here. And each row is half as long as all banks: the four chunks of
  // a row change places, differently in each pair of rows, so that eight rows meet in no bank.
  static constexpr __device__ int row_of(int slot) {
    return kByK ? slot % (kOuter / kVector) * kVector + slot / (kOuter / kVector) : slot;
  }
  static constexpr __device__ int slot_of(int row) {
    return kByK ? row % kVector * (kOuter / kVector) + row / kVector : row;
  }
  static constexpr __device__ int place(int slot, int chunk) {
    return (slot * kChunksOfRow + (kByK ? chunk ^ (slot / 2 % 4) : chunk)) * kChunk;
  }
  // Of an element, in elements.
  static constexpr __device__ int offset(int outer, int k) {
    const int slot = slot_of(kByK ? outer : k), in_row = kByK ? k : outer;
    return place(slot, in_row / kChunkSize) / static_cast<int>(sizeof(T)) + in_row % kChunkSize;
  }
};

// Which rows or columns of the block's tile a thread has: kCount of kOuter, in vectors, those of neighbouring lanes
// adjacent.
template <class S, int kOuter, int kCount>
struct Share {
  static constexpr int kVector = kPack<S>;

  int lane;  // 0 .. kOuter / kCount - 1

  __device__ int operator[](int i) const { return first() + beyond_first(i); }
  __device__ int first() const { return lane * kVector; }
  static constexpr __device__ int beyond_first(int i) {
    return i / kVector * (kOuter / kCount) * kVector + i % kVector;
  }

  // Where the tile has element [(*this)[i], k + beyond]; k is a multiple of a chunk. Only the first part depends on the
  // lane, as the rest is a multiple of eight rows (see SimtOperandTile).
  template <class Tile>
  __device__ int offset(int i, int k, int beyond) const {
    static_assert(kOuter / kCount % 8 == 0 && kOuter / kVector % 8 == 0);
    return Tile::offset(first(), k) + Tile::offset(beyond_first(i), beyond);
  }
};

// A thread's results.
template <class T, class Tile, Major kMajorA, Major kMajorB>
struct ThreadTile {
  using S = ComputeType<T>;
  using A = SimtOperandTile<T, Tile::kM, kMajorA>;
  using B = SimtOperandTile<T, Tile::kN, kMajorB>;
  static constexpr int kVector = kPack<S>, kChunkSize = kPack<T>;
  static_assert(kVector == kChunkSize || (A::kByK && B::kByK));

  // A warp has 8 x 4 threads. Lanes that differ in bit 0 read the same of a, those that differ in bit 1 the same of b:
  // so the two quarters of each half of the warp are served at once.
  static constexpr int kRowLanes = 8, kColumnLanes = 4;
  static_assert(Tile::kM / Tile::kThreadM % kRowLanes == 0);
  static_assert(Tile::kN / Tile::kThreadN % kColumnLanes == 0);
  static constexpr int kWarpColumns = Tile::kN / Tile::kThreadN / kColumnLanes;

  Share<S, Tile::kM, Tile::kThreadM> rows;
  Share<S, Tile::kN, Tile::kThreadN> columns;
  S sums[Tile::kThreadM][Tile::kThreadN] = {};

  // Which rows and columns are the thread's.
  __device__ void place(int thread) {
    const int lane = thread % kWarp, warp = thread / kWarp;
    rows.lane = warp / kWarpColumns * kRowLanes + lane / 2 % kRowLanes;
    columns.lane = warp % kWarpColumns * kColumnLanes + lane % 2 + lane / 16 * 2;
  }

  __device__ void add_step(const T* a, const T* b) {
#pragma unroll 2  // more would take more registers, to load further ahead
    for (int k = 0; k < A::kK; k += kChunkSize) {
      S x[kChunkSize][Tile::kThreadM];
      read_rows(a, k, x);
      if constexpr (B::kByK) {
#pragma unroll
        for (int j = 0; j < Tile::kThreadN; ++j) {
          const Pack<T, kChunkSize> y = load_pack<T, kChunkSize>(b + columns.template offset<B>(j, k, 0));
#pragma unroll
          for (int beyond = 0; beyond < kChunkSize; ++beyond) add(j, x[beyond], y.at[beyond]);
        }
      } else {
#pragma unroll
        for (int beyond = 0; beyond < kChunkSize; ++beyond) {
#pragma unroll
          for (int j = 0; j < Tile::kThreadN; j += kVector) {
            const Pack<T, kVector> y = load_pack<T, kVector>(b + columns.template offset<B>(j, k, beyond));
#pragma unroll
            for (int e = 0; e < kVector; ++e) add(j + e, x[beyond], y.at[e]);
          }
        }
      }
    }
  }

 private:
  __device__ void read_rows(const T* a, int k, S (&x)[kChunkSize][Tile::kThreadM]) const {
    if constexpr (A::kByK) {
#pragma unroll
      for (int i = 0; i < Tile::kThreadM; ++i) {
        const Pack<T, kChunkSize> pack = load_pack<T, kChunkSize>(a + rows.template offset<A>(i, k, 0));
#pragma unroll
        for (int beyond = 0; beyond < kChunkSize; ++beyond) x[beyond][i] = pack.at[beyond];
      }
    } else {
#pragma unroll
      for (int beyond = 0; beyond < kChunkSize; ++beyond) {
#pragma unroll
        for (int i = 0; i < Tile::kThreadM; i += kVector) {
          const Pack<T, kVector> pack = load_pack<T, kVector>(a + rows.template offset<A>(i, k, beyond));
#pragma unroll
          for (int e = 0; e < kVector; ++e) x[beyond][i + e] = pack.at[e];
        }
      }
    }
  }

  __device__ void add(int j, const S (&x)[Tile::kThreadM], S y) {
#pragma unroll
    for (int i = 0; i < Tile::kThreadM; ++i) sums[i][j] = fma(x[i], y, sums[i][j]);
  }
};

template <class T, class Tile, Major kMajorA, Major kMajorB>
struct SimtKernel {
  using S = ComputeType<T>;
  using Results = ThreadTile<T, Tile, kMajorA, kMajorB>;
  using A = typename Results::A;
  using B = typename Results::B;
  using Ring = OperandRing<T, A, B>;

  static constexpr int shared_bytes(bool masked, bool sums_rows) {
    return Ring::shared_bytes(masked) + (sums_rows ? Tile::kM * static_cast<int>(sizeof(double)) : 0);
  }

  __device__ static void run(const TiledWork<T>& work) {
    const Epilogue<T>& epilogue = work.epilogue;
    const TileShare share = share_of(work.tiling, static_cast<int>(blockIdx.x));
    const bool sums_row = epilogue.row_sums && share.column == 0 && threadIdx.x < Tile::kM;
    // In shared memory, as registers are scarce; each thread uses its own alone.
    char* const shared = shared_memory();
    const bool masked = work.relu_mask.operand.data != nullptr;
    double* const row_sums = reinterpret_cast<double*>(shared + Ring::shared_bytes(masked));
    if (sums_row) row_sums[threadIdx.x] = 0;

    Results results;
    results.place(threadIdx.x);
    Ring::for_each_step(work, share, shared, [&](const char* a_bytes, const char* b_bytes) {
      const T *a = reinterpret_cast<const T*>(a_bytes), *b = reinterpret_cast<const T*>(b_bytes);
      if (sums_row) {
        const int row = threadIdx.x;
        S sum = 0;
#pragma unroll 4
        for (int k = 0; k < A::kK; ++k) sum += widen(a[A::offset(row, k)]);
        row_sums[row] += sum;
      }
      results.add_step(a, b);
    });

    const int64_t first_row = int64_t{share.row} * Tile::kM, first_column = int64_t{share.column} * Tile::kN;
    if (sums_row) store_row_sum(epilogue, share.split, first_row + threadIdx.x, row_sums[threadIdx.x]);
    constexpr int kVector = Results::kVector;
#pragma unroll
    for (int i = 0; i < Tile::kThreadM; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kThreadN; j += kVector) {
        Pack<S, kVector> sums;
        for (int e = 0; e < kVector; ++e) sums.at[e] = results.sums[i][j + e];
        const int64_t column = first_column + results.columns[j];
        store_sums(epilogue, share.split, first_row + results.rows[i], column, sums,
                   bias_at<T, kVector>(epilogue, column));
      }
    }
  }
};

template <class T, class Tile, Major kMajorA, Major kMajorB>
__global__ void __launch_bounds__(kTileThreads, Tile::kBlocksPerSm)
    product_simt_kernel(const __grid_constant__ TiledWork<T> work) {
  SimtKernel<T, Tile, kMajorA, kMajorB>::run(work);
}

}  // namespace mnist_ext::cuda
