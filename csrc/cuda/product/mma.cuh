// A tile of the result to each block of four warps; tiles of the operands come in through shared memory by asynchronous
// copies, several ahead, and from there as fragments to the tensor cores.
#pragma once

#include "../device/async_copy.cuh"
#include "epilogue.cuh"
#include "../device/tensor_cores.cuh"
#include "tiles.cuh"

namespace mnist_ext::cuda {

inline constexpr int kMmaThreads = 128;
inline constexpr int kMmaDepthBytes = 64;  // of a tile of an operand
inline constexpr int kChunk = 16;          // bytes of one asynchronous copy, and of a row of ldmatrix

// A tile of an operand in shared memory: as in global memory, its rows run along the major index. Chunks of a row are
// permuted, differently from row to row, so that neither the copies nor the fragments of a warp meet in one bank.
template <class T, Major kMajor, int kOuter>
struct MmaTile {
  static constexpr int kDepth = kMmaDepthBytes / sizeof(T);
  static constexpr int kRows = kMajor == Major::depth ? kOuter : kDepth;
  static constexpr int kChunksOfRow = (kMajor == Major::depth ? kDepth : kOuter) * sizeof(T) / kChunk;
  static constexpr int kBytes = kRows * kChunksOfRow * kChunk;

  __device__ static int place(int row, int chunk) {
    int permuted = chunk;
    if constexpr (kMajor == Major::depth) {
      permuted ^= row / 2 % 4;  // two rows lie side by side in the banks
    } else if constexpr (sizeof(T) == 2) {
      permuted ^= row % 8;
    } else {
      permuted ^= row % 4 * 2;  // a warp reads two chunks of four rows at once
    }
    return (row * kChunksOfRow + permuted) * kChunk;
  }
};

// An operand in global memory, for the tiles of one block.
template <class T>
struct Source {
  Operand<T> operand;
  int64_t outer;   // its size
  int copy_bytes;  // of one asynchronous copy: 16 or 4, as alignment and strides allow, or 0: element by element
};

// Brings the tiles of an operand into shared memory, one after the other along the depth.
template <class T, Major kMajor, int kOuter>
class TileLoader {
  using Tile = MmaTile<T, kMajor, kOuter>;
  static constexpr int kChunkSize = kPack<T>;
  static constexpr int kRowsAtOnce = kMmaThreads / Tile::kChunksOfRow;
  static constexpr int kPasses = Tile::kRows / kRowsAtOnce;
  static_assert(kMmaThreads % Tile::kChunksOfRow == 0 && Tile::kRows % kRowsAtOnce == 0);

 public:
  // `source` outlives this; it is in the kernel's arguments, where its strides cost no registers.
  __device__ TileLoader(const Source<T>& source, int64_t first_outer, int64_t first_depth) : source_(source) {
    const int64_t outer = first_outer + (kMajor == Major::depth ? row() : element());
    const int64_t depth = first_depth + (kMajor == Major::depth ? element() : row());
    from_ = source.operand.data + outer * source.operand.outer_stride + depth * source.operand.k_stride;
    const int64_t left = source.outer - outer;
    outer_left_ = static_cast<int>(left < kOuter ? left : kOuter);
  }

  // The next tile, of which `depth_left` are left; the rest is filled with 0.
  __device__ void load(char* tile, int64_t depth_left) {
    const int left = static_cast<int>(depth_left < Tile::kDepth ? depth_left : Tile::kDepth);
    const int64_t next_row =
        kRowsAtOnce * (kMajor == Major::depth ? source_.operand.outer_stride : source_.operand.k_stride);
    if (source_.copy_bytes == kChunk) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        cp_async<kChunk>(place(tile, pass), from_ + pass * next_row, size(pass, left) * static_cast<int>(sizeof(T)));
      }
    } else {
#pragma unroll 1
      for (int pass = 0; pass < kPasses; ++pass)
        load_parts(place(tile, pass), from_ + pass * next_row, size(pass, left));
    }
    from_ += Tile::kDepth * source_.operand.k_stride;
  }

 private:
  __device__ static int row() { return static_cast<int>(threadIdx.x) / Tile::kChunksOfRow; }
  __device__ static int chunk() { return static_cast<int>(threadIdx.x) % Tile::kChunksOfRow; }
  __device__ static int element() { return chunk() * kChunkSize; }
  __device__ static char* place(char* tile, int pass) {
    return tile + Tile::place(row() + pass * kRowsAtOnce, chunk());
  }

  // Of this thread's chunk.
  __device__ int size(int pass, int depth_left) const {
    int left;
    if constexpr (kMajor == Major::depth) {
      left = pass * kRowsAtOnce < outer_left_ ? depth_left - element() : 0;
    } else {
      left = row() + pass * kRowsAtOnce < depth_left ? outer_left_ : 0;
    }
    return left < 0 ? 0 : left < kChunkSize ? left : kChunkSize;
  }

  __device__ void load_parts(char* to, const T* from, int size) const {
    const int64_t next = kMajor == Major::depth ? source_.operand.k_stride : source_.operand.outer_stride;
    if (source_.copy_bytes == 4) {
      constexpr int kSize = 4 / sizeof(T);
#pragma unroll
      for (int i = 0; i < kChunkSize; i += kSize) {
        const int left = size - i;
        cp_async<4>(to + i * sizeof(T), from + i * next,
                    (left < 0       ? 0
                     : left < kSize ? left
                                    : kSize) *
                        static_cast<int>(sizeof(T)));
      }
      return;
    }
    T elements[kChunkSize] = {};
#pragma unroll
    for (int i = 0; i < kChunkSize; ++i) {
      if (i < size) elements[i] = from[i * next];
    }
    uint4 bits;
    memcpy(&bits, elements, sizeof bits);
    store_vector(to, bits);
  }

  const Source<T>& source_;
  const T* from_;  // this thread's first chunk of the next tile
  int outer_left_;
};

// A fragment of 16 outer by 32 bytes of depth, `step` of the tile's steps along the depth: words 0 and 1 are of outer r
// and r + 8, words 2 and 3 the same for the second half of the depth.
template <class T, Major kMajor, int kOuter>
__device__ void load_fragment_a(uint32_t (&a)[4], const char* tile, int outer, int step) {
  using Tile = MmaTile<T, kMajor, kOuter>;
  const int lane = threadIdx.x % kWarp;
  if constexpr (kMajor == Major::depth) {
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

// Two fragments of 8 outer by 32 bytes of depth: words 0 and 1 are the halves of the depth of the first.
template <class T, Major kMajor, int kOuter>
__device__ void load_fragments_b(uint32_t (&b)[4], const char* tile, int outer, int step) {
  using Tile = MmaTile<T, kMajor, kOuter>;
  const int lane = threadIdx.x % kWarp;
  if constexpr (kMajor == Major::depth) {
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

template <class T>
struct MmaWork {
  Source<T> a, gate, b;
  int64_t depth, depth_of_part;  // a part's is a multiple of a tile's
  int row_tiles, column_tiles;
  Output<T> output;
};

// kSide: of the tile of the result, which the four warps divide two by two. Grid: tiles times parts of the depth.
template <class T, Major kMajorA, Major kMajorB, bool kGated, int kSide>
struct MmaKernel {
  using TileA = MmaTile<T, kMajorA, kSide>;
  using TileB = MmaTile<T, kMajorB, kSide>;
  static constexpr int kStages = kGated ? 3 : 4;
  static constexpr int kStageBytes = (kGated ? 2 : 1) * TileA::kBytes + TileB::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kWarpSide = kSide / 2;
  static constexpr int kFragmentsA = kWarpSide / 16, kFragmentsB = kWarpSide / 8;
  static constexpr int kSteps = kMmaDepthBytes / 32;

  // The sums of a warp's share of the tile.
  float sum[kFragmentsA][kFragmentsB][4] = {};
  RowSums row_sums[kFragmentsA / 2];  // two warps share rows; each sums half of them

  // One tile of the depth.
  __device__ void add(const char* stage, int warp_row, int warp_column, int summed_half) {
    const char *a_tile = stage, *b_tile = stage + TileA::kBytes, *gate_tile = b_tile + TileB::kBytes;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[kFragmentsA][4], b[kFragmentsB / 2][4];
#pragma unroll
      for (int i = 0; i < kFragmentsA; ++i) {
        load_fragment_a<T, kMajorA, kSide>(a[i], a_tile, warp_row + 16 * i, step);
        if constexpr (kGated) {
          uint32_t gate[4];
          load_fragment_a<T, kMajorA, kSide>(gate, gate_tile, warp_row + 16 * i, step);
#pragma unroll
          for (int k = 0; k < 4; ++k) a[i][k] = behind_gate<T>(a[i][k], gate[k]);
        }
      }
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

  __device__ void run(const MmaWork<T>& work) {
    const int tiles = work.row_tiles * work.column_tiles, block = static_cast<int>(blockIdx.x), part = block / tiles;
    const TilePosition at = tile_position(block % tiles, work.row_tiles, work.column_tiles);
    const int64_t row = int64_t{at.row} * kSide, column = int64_t{at.column} * kSide;
    const int64_t begin = part * work.depth_of_part;
    const int64_t left = work.depth - begin;
    const int64_t depth = left < work.depth_of_part ? left : work.depth_of_part;
    const int64_t depth_tiles = (depth + TileA::kDepth - 1) / TileA::kDepth;

    TileLoader<T, kMajorA, kSide> a(work.a, row, begin), gate(work.gate, row, begin);
    TileLoader<T, kMajorB, kSide> b(work.b, column, begin);
    char* shared = shared_memory();
    const auto load = [&](int64_t i) {
      if (i < depth_tiles) {
        char* stage = shared + i % kStages * kStageBytes;
        a.load(stage, depth - i * TileA::kDepth);
        b.load(stage + TileA::kBytes, depth - i * TileA::kDepth);
        if constexpr (kGated) gate.load(stage + TileA::kBytes + TileB::kBytes, depth - i * TileA::kDepth);
      }
      cp_async_commit();  // an empty group too, so that the number of groups is that of tiles
    };

    const int warp = threadIdx.x / kWarp, warp_row = warp / 2 * kWarpSide, warp_column = warp % 2 * kWarpSide;
    const int summed_half = work.output.row_sums && at.column == 0 ? warp % 2 : -1;
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) load(i);
    for (int64_t i = 0; i < depth_tiles; ++i) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // the tile is there for all, and all are through with the one before it, whose place is free
      load(i + kStages - 1);
      add(shared + i % kStages * kStageBytes, warp_row, warp_column, summed_half);
    }
    cp_async_wait<0>();  // of empty groups

#pragma unroll
    for (int i = 0; i < kFragmentsA; ++i) {
      store_sums(work.output, sum[i], row + warp_row + 16 * i, column + warp_column, part);
      if (i / (kFragmentsA / 2) == summed_half) {
        store_row_sums(work.output, row_sums[i % (kFragmentsA / 2)], row + warp_row + 16 * i, part);
      }
    }
  }
};

template <class T, Major kMajorA, Major kMajorB, bool kGated, int kSide>
__global__ void __launch_bounds__(kMmaThreads, kSide == 128 ? 2 : 4)
    linear_mma_kernel(const __grid_constant__ MmaWork<T> work) {
  MmaKernel<T, kMajorA, kMajorB, kGated, kSide>().run(work);
}

}  // namespace mnist_ext::cuda
