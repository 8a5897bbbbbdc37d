// The main loop of mma.sync, from compute capability 8.0 on: each block of four warps makes a tile of C; tiles of the
// operands come in through shared memory by asynchronous copies, several ahead, and from there as fragments to the
// tensor cores.
#pragma once

#include "plan.cuh"
#include "tiles.cuh"

namespace mnist_ext::cuda {

// A tile of an operand in shared memory: as in global memory, its rows run along the major index. Chunks of a row are
// permuted, differently from row to row, so that neither the copies nor the fragments of a warp meet in one bank.
template <class T, Major kMajor_, int kOuter_>
struct MmaOperandTile {
  static constexpr int kOuter = kOuter_;
  static constexpr Major kMajor = kMajor_;
  static constexpr int kK = kStepBytes / sizeof(T);
  static constexpr int kRows = kMajor == Major::k ? kOuter : kK;
  static constexpr int kChunksOfRow = (kMajor == Major::k ? kK : kOuter) * sizeof(T) / kChunk;
  static constexpr int kBytes = kRows * kChunksOfRow * kChunk;

  static constexpr __device__ int row_of(int slot) { return slot; }
  static constexpr __device__ int place(int row, int chunk) {
    int permuted = chunk;
    if constexpr (kMajor == Major::k) {
      permuted ^= row / 2 % 4;  // two rows fill all banks
    } else if constexpr (sizeof(T) == 2) {
      permuted ^= row % 8;
    } else {
      permuted ^= row % 4 * 2;  // a warp reads two chunks of four rows at once
    }
    return (row * kChunksOfRow + permuted) * kChunk;
  }
};

// A fragment of 16 outer by 32 bytes of K, `step` of the tile's steps along K: words 0 and 1 are of outer r
// and r + 8, words 2 and 3 the same for the second half of K.
template <class T, Major kMajor, int kOuter>
__device__ void load_fragment_a(uint32_t (&a)[4], const char* tile, int outer, int step) {
  using Tile = MmaOperandTile<T, kMajor, kOuter>;
  const int lane = threadIdx.x % kWarp;
  if constexpr (kMajor == Major::k) {
    ldmatrix<false>(a, tile + Tile::place(outer + lane % 16, 2 * step + lane / 16));
  } else if constexpr (sizeof(T) == 2) {
    ldmatrix<true>(a, tile + Tile::place(16 * step + lane / 16 * 8 + lane % 8, outer / 8 + lane / 8 % 2));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = outer + lane / 4 + i % 2 * 8, k = 8 * step + lane % 4 + i / 2 * 4;
      a[i] = load_word(tile + Tile::place(k, m / 4) + m % 4 * 4);
    }
  }
}

// Two fragments of 8 outer by 32 bytes of K: words 0 and 1 are the halves of K of the first.
template <class T, Major kMajor, int kOuter>
__device__ void load_fragments_b(uint32_t (&b)[4], const char* tile, int outer, int step) {
  using Tile = MmaOperandTile<T, kMajor, kOuter>;
  const int lane = threadIdx.x % kWarp;
  if constexpr (kMajor == Major::k) {
    ldmatrix<false>(b, tile + Tile::place(outer + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
  } else if constexpr (sizeof(T) == 2) {
    ldmatrix<true>(b, tile + Tile::place(16 * step + lane / 8 % 2 * 8 + lane % 8, outer / 8 + lane / 16));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = outer + lane / 4 + i / 2 * 8, k = 8 * step + lane % 4 + i % 2 * 4;
      b[i] = load_word(tile + Tile::place(k, n / 4) + n % 4 * 4);
    }
  }
}

// kSide: of the tile of C, which the four warps divide two by two.
template <class T, Major kMajorA, Major kMajorB, int kSide>
struct MmaKernel {
  using A = MmaOperandTile<T, kMajorA, kSide>;
  using B = MmaOperandTile<T, kMajorB, kSide>;
  using Ring = OperandRing<T, A, B>;
  static constexpr int kWarpSide = kSide / 2;
  static constexpr int kFragmentsA = kWarpSide / 16, kFragmentsB = kWarpSide / 8;

  // The sums of a warp's share of the tile.
  float sum[kFragmentsA][kFragmentsB][4] = {};
  RowSums row_sums[kFragmentsA / 2];  // two warps share rows; each sums half of them

  __device__ void add_step(const char* a_tile, const char* b_tile, int warp_row, int warp_column, int summed_half) {
#pragma unroll
    for (int step = 0; step < kStepBytes / 32; ++step) {
      uint32_t a[kFragmentsA][4], b[kFragmentsB / 2][4];
#pragma unroll
      for (int i = 0; i < kFragmentsA; ++i) load_fragment_a<T, kMajorA, kSide>(a[i], a_tile, warp_row + 16 * i, step);
#pragma unroll
      for (int i = 0; i < kFragmentsB / 2; ++i) {
        load_fragments_b<T, kMajorB, kSide>(b[i], b_tile, warp_column + 16 * i, step);
      }
#pragma unroll
      for (int i = 0; i < kFragmentsA; ++i) {
        if (i / (kFragmentsA / 2) != summed_half) continue;
        float part[2] = {};
#pragma unroll
        for (int k = 0; k < 4; ++k) part[k % 2] += sum_of_elements<T>(a[i][k]);
        row_sums[i % (kFragmentsA / 2)].add(part);
      }
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int i = 0; i < kFragmentsA; ++i) a[i][k] = rounded_to_tf32(a[i][k]);
#pragma unroll
          for (int i = 0; i < kFragmentsB / 2; ++i) b[i][k] = rounded_to_tf32(b[i][k]);
        }
      }
#pragma unroll
      for (int i = 0; i < kFragmentsA; ++i) {
#pragma unroll
        for (int j = 0; j < kFragmentsB; ++j) {
          mma<T>(sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  __device__ void run(const TiledWork<T>& work) {
    const TileShare share = share_of(work.tiling, static_cast<int>(blockIdx.x));
    const int warp = threadIdx.x / kWarp, warp_row = warp / 2 * kWarpSide, warp_column = warp % 2 * kWarpSide;
    const int summed_half = work.epilogue.row_sums && share.column == 0 ? warp % 2 : -1;
    Ring::for_each_step(work, share, shared_memory(),
                        [&](const char* a, const char* b) { add_step(a, b, warp_row, warp_column, summed_half); });
    const int64_t row = int64_t{share.row} * kSide + warp_row, column = int64_t{share.column} * kSide + warp_column;
#pragma unroll
    for (int i = 0; i < kFragmentsA; ++i) {
      store_fragments(work.epilogue, share.split, sum[i], row + 16 * i, column);
      if (i / (kFragmentsA / 2) != summed_half) continue;
      store_row_sums(work.epilogue, share.split, row_sums[i % (kFragmentsA / 2)], row + 16 * i);
    }
  }
};

template <class T, Major kMajorA, Major kMajorB, int kSide>
__global__ void __launch_bounds__(kTileThreads, kSide == 128 ? 2 : 4)
    product_mma_kernel(const __grid_constant__ TiledWork<T> work) {
  MmaKernel<T, kMajorA, kMajorB, kSide>().run(work);
}

template <class T>
void launch_mma(const Product<T>& product, const Plan& plan, const Epilogue<T>& epilogue, cudaStream_t stream) {
  const Major a = major_of(product.a), b = major_of(product.b);
  with_majors(a, b, [&]<Major kMajorA, Major kMajorB>() {
    const TiledWork<T> work = tiled_work(product, plan, epilogue, kMajorA, kMajorB);
    const auto start = [&]<int kSide>() {
      using Ring = typename MmaKernel<T, kMajorA, kMajorB, kSide>::Ring;
      launch("product mma", product_mma_kernel<T, kMajorA, kMajorB, kSide>,
             Shape{blocks_of(plan), kTileThreads, Ring::shared_bytes(product.relu_mask.data != nullptr)}, stream, work);
    };
    plan.tile == 1 ? start.template operator()<128>() : start.template operator()<64>();
  });
}

}  // namespace mnist_ext::cuda
