// The products of a linear layer on compute capability 9.0: docs/hopper-linear.md says why it is built so.
//
// A block stays on its multiprocessor and does one tile of the result after the other. One of its threads, the
// producer, has tiles of the operands copied into a ring of stages in shared memory; two warpgroups, the consumers,
// multiply what is there, 64 rows of the tile each. A stage is handed over by two barriers: `full` ends a phase when
// the bytes have arrived, `empty` when every warp that reads them is through. Two blocks may form a cluster: their
// tiles lie above each other, and each copies one half of what they share, b, to both.
#pragma once

#include "epilogue.cuh"
#include "../device/hopper.cuh"
#include "../device/tensor_cores.cuh"
#include "tiles.cuh"

namespace mnist_ext::cuda {

inline constexpr int kWarpgroup = 128;
inline constexpr int kWgmmaConsumers = 2;  // warpgroups
inline constexpr int kWgmmaThreads = kWarpgroup * (1 + kWgmmaConsumers);
inline constexpr int kWgmmaRows = 64 * kWgmmaConsumers;  // of a tile of the result
template <class T>
inline constexpr int kWgmmaDepth = kSwizzleBytes / sizeof(T);  // of a stage
inline constexpr int kWgmmaSteps = kSwizzleBytes / 32;         // by wgmma, each 32 bytes deep
inline constexpr int kBoxBytes = 64 * kSwizzleBytes;           // of 64 rows
inline constexpr int kRingBytes = 192 << 10;
inline constexpr int kSwizzleAlignment = 1024;

template <class T>
struct WgmmaWork {
  TensorMap a, gate, b;
  bool gated;
  int row_tiles, column_tiles;  // row_tiles is a multiple of the cluster's size
  int depth_tiles, depth_tiles_of_part, parts;
  Output<T> output;
};

// A place in the ring of stages, and the parity of the phase that its barriers are in.
template <int kStages>
struct RingPosition {
  int stage = 0;
  unsigned parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// kFragments: a is read into registers first, where its gate and the sums of its rows can be had; else the tensor cores
// read it from shared memory, which they do for a along the depth only. Floats become TF32: those that the tensor cores
// read from shared memory, in the copy that brings them there; those of fragments, once they have been summed.
template <class T, Major kMajorA, Major kMajorB, bool kFragments, int kColumns>
struct WgmmaKernel {
  static_assert(kFragments || kMajorA == Major::depth);
  static constexpr int kBytesA = kWgmmaRows * kSwizzleBytes, kBytesB = kColumns * kSwizzleBytes;
  static constexpr int kStageBytes = (kFragments ? 2 : 1) * kBytesA + kBytesB;
  static constexpr int kStages = kRingBytes / kStageBytes;
  static constexpr int kSharedBytes =
      kSwizzleAlignment + kStages * (kStageBytes + 2 * static_cast<int>(sizeof(uint64_t)));
  static constexpr int kTiles = kColumns / 8;
  static constexpr int kDepth = kWgmmaDepth<T>;

  using Ring = RingPosition<kStages>;

  const WgmmaWork<T>& work;
  char* stages;
  uint64_t *full, *empty;

  __device__ explicit WgmmaKernel(const WgmmaWork<T>& all_work) : work(all_work) {
    char* shared = shared_memory();
    stages = shared + (kSwizzleAlignment - shared_address(shared) % kSwizzleAlignment) % kSwizzleAlignment;
    full = reinterpret_cast<uint64_t*>(stages + kStages * kStageBytes);
    empty = full + kStages;
  }

  // A tile of the result and a part of the depth.
  struct Item {
    int row, column, first_depth_tile, depth_tiles, part;
    bool first_column;
  };

  // One after the other: the cluster's own, and then every so many further.
  __device__ static int first_item() { return static_cast<int>(blockIdx.x / cluster_size()); }
  __device__ static int items_at_once() { return static_cast<int>(gridDim.x / cluster_size()); }
  __device__ int items() const { return tiles_of_part() * work.parts; }
  __device__ int tiles_of_part() const { return work.row_tiles / static_cast<int>(cluster_size()) * work.column_tiles; }

  __device__ Item item(int i) const {
    const int cluster = static_cast<int>(cluster_size()), rank = static_cast<int>(cluster_rank());
    const int part = i / tiles_of_part();
    const TilePosition at = tile_position(i % tiles_of_part(), work.row_tiles / cluster, work.column_tiles);
    const int first = part * work.depth_tiles_of_part, left = work.depth_tiles - first;
    return {.row = (at.row * cluster + rank) * kWgmmaRows,
            .column = at.column * kColumns,
            .first_depth_tile = first,
            .depth_tiles = left < work.depth_tiles_of_part ? left : work.depth_tiles_of_part,
            .part = part,
            .first_column = at.column == 0};
  }

  // `outer` rows of an operand from `first` on, kDepth deep.
  template <Major kMajor>
  __device__ static void copy_operand(char* to, const TensorMap& map, int first, int outer, int depth,
                                      uint64_t* barrier, unsigned blocks) {
    if constexpr (kMajor == Major::depth) {
      copy_box(to, map, depth, first, barrier, blocks);
    } else {
      for (int i = 0; i < outer; i += kDepth) copy_box(to + i * kSwizzleBytes, map, first + i, depth, barrier, blocks);
    }
  }

  __device__ void produce() {
    const unsigned cluster = cluster_size(), all = cluster == 1 ? 0 : (1u << cluster) - 1;
    const int share = kColumns / static_cast<int>(cluster), first_of_share = share * static_cast<int>(cluster_rank());
    const unsigned bytes = kBytesA + kBytesB + (work.gated ? kBytesA : 0);
    Ring ring;
    for (int i = first_item(); i < items(); i += items_at_once()) {
      const Item at = item(i);
      for (int k = 0; k < at.depth_tiles; ++k, ring.advance()) {
        char* stage = stages + ring.stage * kStageBytes;
        uint64_t* barrier = full + ring.stage;
        const int depth = (at.first_depth_tile + k) * kDepth;
        mbarrier_wait(empty + ring.stage, ring.parity ^ 1);
        mbarrier_arrive_expect_tx(barrier, bytes);
        copy_operand<kMajorA>(stage, work.a, at.row, kWgmmaRows, depth, barrier, 0);
        copy_operand<kMajorB>(stage + kBytesA + first_of_share * kSwizzleBytes, work.b, at.column + first_of_share,
                              share, depth, barrier, all);
        if (work.gated) {
          copy_operand<kMajorA>(stage + kBytesA + kBytesB, work.gate, at.row, kWgmmaRows, depth, barrier, 0);
        }
      }
    }
  }

  // Every warp of the cluster that has read the stage says so to each block that copies into it.
  __device__ void release(int stage) {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) {
      for (unsigned rank = 0; rank < cluster_size(); ++rank) mbarrier_arrive(empty + stage, rank);
    }
  }

  __device__ static uint64_t descriptor_b(const char* stage, int step) {
    return wgmma_descriptor<kMajorB>(stage + kBytesA + step * (kMajorB == Major::depth ? 32 : 16 * kSwizzleBytes));
  }

  // The tensor cores read both operands from shared memory; one stage is being multiplied while the next is started.
  __device__ void multiply(float (&sum)[kTiles][4], Ring& ring, int depth_tiles, int consumer) {
    int last = 0;
    for (int k = 0; k < depth_tiles; ++k, ring.advance()) {
      const char* stage = stages + ring.stage * kStageBytes;
      mbarrier_wait(full + ring.stage, ring.parity);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kWgmmaSteps; ++step) {
        wgmma<T, kMajorB>(sum, wgmma_descriptor<Major::depth>(stage + consumer * kBoxBytes + 32 * step),
                          descriptor_b(stage, step), k + step > 0);
      }
      wgmma_commit_group();
      wgmma_wait_group<1>();
      if (k > 0) release(last);
      last = ring.stage;
    }
    wgmma_wait_group<0>();
    release(last);
  }

  // A warp's fragments of a for one stage, behind the gate.
  struct Fragments {
    uint32_t word[kWgmmaSteps][4];
  };

  // One step of the depth. Floats across the depth come in an order that `arrange` mends.
  __device__ void load(uint32_t (&a)[4], const char* tile, int step, int warp) const {
    const int lane = threadIdx.x % kWarp;
    if constexpr (kMajorA == Major::depth) {
      const int row = 16 * warp + lane % 16, chunk = 2 * step + lane / 16;
      ldmatrix<false>(a, tile + row * kSwizzleBytes + (chunk ^ row % 8) * 16);
    } else if constexpr (sizeof(T) == 2) {
      const int row = 16 * step + lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
      ldmatrix<true>(a, tile + row * kSwizzleBytes + (chunk ^ row % 8) * 16);
    } else {
      // Lanes 4 r + c want columns r and r + 8 of rows c and c + 4. Were all to read the same quarter at once, rows 2 i
      // and 2 i + 1 would meet in one bank.
      const int r = lane / 4, c = lane % 4;
      const char* box = tile + warp / 2 * kDepth * kSwizzleBytes;  // of 32 columns
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int quarter = i ^ c;
        const int row = c + quarter / 2 * 4, column = 16 * (warp % 2) + r + quarter % 2 * 8;
        a[i] = load_word(box + (8 * step + row) * kSwizzleBytes + (column / 4 ^ row) * 16 + column % 4 * 4);
      }
    }
  }

  __device__ static void arrange(uint32_t (&a)[4]) {
    if constexpr (sizeof(T) == 4 && kMajorA == Major::outer) {
      const int c = threadIdx.x % 4;
      const auto exchange_if = [&](bool wanted, int i, int j) {
        const uint32_t first = a[i];
        a[i] = wanted ? a[j] : first;
        a[j] = wanted ? first : a[j];
      };
      exchange_if(c & 1, 0, 1);
      exchange_if(c & 1, 2, 3);
      exchange_if(c & 2, 0, 2);
      exchange_if(c & 2, 1, 3);
    }
  }

  __device__ void load(Fragments& a, const Ring& ring, int consumer, bool sums_rows, RowSums& row_sums) {
    const int warp = threadIdx.x / kWarp % 4;
    const char* tile = stages + ring.stage * kStageBytes + consumer * kBoxBytes;
    mbarrier_wait(full + ring.stage, ring.parity);
#pragma unroll
    for (int step = 0; step < kWgmmaSteps; ++step) load(a.word[step], tile, step, warp);
    if (work.gated) {
#pragma unroll
      for (int step = 0; step < kWgmmaSteps; ++step) {
        uint32_t gate[4];
        load(gate, tile + kBytesA + kBytesB, step, warp);
#pragma unroll
        for (int i = 0; i < 4; ++i) a.word[step][i] = behind_gate<T>(a.word[step][i], gate[i]);
      }
    }
#pragma unroll
    for (int step = 0; step < kWgmmaSteps; ++step) arrange(a.word[step]);
    if (sums_rows) {
      float part[2] = {};
#pragma unroll
      for (int step = 0; step < kWgmmaSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) part[i % 2] += sum_of_elements<T>(a.word[step][i]);
      }
      row_sums.add(part);
    }
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int step = 0; step < kWgmmaSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a.word[step][i] = rounded_to_tf32(a.word[step][i]);
      }
    }
  }

  // While the tensor cores multiply the fragments of one stage, those of the next are fetched.
  __device__ void multiply_fragments(float (&sum)[kTiles][4], Ring& ring, int depth_tiles, int consumer, bool sums_rows,
                                     RowSums& row_sums) {
    Fragments even, odd;
    load(even, ring, consumer, sums_rows, row_sums);
    const auto multiply_stage = [&](Fragments& a, Fragments& next, int k) {
      const int stage = ring.stage;
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kWgmmaSteps; ++step) {
        wgmma<T, kMajorB>(sum, a.word[step], descriptor_b(stages + stage * kStageBytes, step), k + step > 0);
      }
      wgmma_commit_group();
      ring.advance();
      if (k + 1 < depth_tiles) load(next, ring, consumer, sums_rows, row_sums);
      wgmma_wait_group<0>();
      release(stage);
    };
    for (int k = 0; k < depth_tiles; k += 2) {
      multiply_stage(even, odd, k);
      if (k + 1 < depth_tiles) multiply_stage(odd, even, k + 1);
    }
  }

  __device__ void consume(int consumer) {
    Ring ring;
    for (int i = first_item(); i < items(); i += items_at_once()) {
      const Item at = item(i);
      float sum[kTiles][4];
      RowSums row_sums;
      const bool sums_rows = kFragments && work.output.row_sums && at.first_column;
      if constexpr (kFragments) {
        multiply_fragments(sum, ring, at.depth_tiles, consumer, sums_rows, row_sums);
      } else {
        multiply(sum, ring, at.depth_tiles, consumer);
      }
      const int row = at.row + 64 * consumer + 16 * (threadIdx.x / kWarp % 4);
      store_sums(work.output, sum, row, at.column, at.part);
      if (sums_rows) store_row_sums(work.output, row_sums, row, at.part);
    }
  }

  __device__ void run() {
    if (threadIdx.x == 0) {
      prefetch_tensor_map(work.a);
      prefetch_tensor_map(work.b);
      for (int i = 0; i < kStages; ++i) {
        mbarrier_init(full + i, 1);
        mbarrier_init(empty + i, 4 * kWgmmaConsumers * cluster_size());
      }
      mbarrier_init_fence();
    }
    cluster_sync();
    if (threadIdx.x < kWarpgroup) {
      setmaxnreg_dec<56>();
      if (threadIdx.x == 0) produce();
    } else {
      setmaxnreg_inc<224>();
      consume(static_cast<int>(threadIdx.x) / kWarpgroup - 1);
    }
    cluster_sync();  // no block ends while others copy into its memory or arrive at its barriers
  }
};

// Where the instructions are missing, the kernel is compiled for blocks too small to be launched with, which tells
// wgmma_takes so.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr int kWgmmaLargestBlock = kWgmmaThreads;
#else
inline constexpr int kWgmmaLargestBlock = kWarp;
#endif

template <class T, Major kMajorA, Major kMajorB, bool kFragments, int kColumns>
__global__ void __launch_bounds__(kWgmmaLargestBlock, 1)
    linear_wgmma_kernel(const __grid_constant__ WgmmaWork<T> work) {
  if constexpr (kWgmmaLargestBlock == kWgmmaThreads) {
    WgmmaKernel<T, kMajorA, kMajorB, kFragments, kColumns>(work).run();
  }
}

}  // namespace mnist_ext::cuda
