// The main loop of wgmma, on compute capability 9.0: docs/hopper-linear.md says why it is built so.
//
// A block stays on its multiprocessor and does one tile of C after the other. One of its threads, the producer, has
// tiles of the operands copied into a ring of stages in shared memory; two warpgroups, the consumers, multiply what is
// there, 64 rows of the tile each. A stage is handed over by two barriers: `full` ends a phase when the bytes have
// arrived, `empty` when every warp that reads them is through. Two blocks may form a cluster: their tiles lie above
// each other, and each copies one half of what they share, B, to both.
#pragma once

#include "../device/hopper.cuh"
#include "plan.cuh"

namespace mnist_ext::cuda {

inline constexpr int kWarpgroup = 128;
inline constexpr int kWgmmaConsumers = 2;  // warpgroups
inline constexpr int kWgmmaThreads = kWarpgroup * (1 + kWgmmaConsumers);
inline constexpr int kWgmmaRows = 64 * kWgmmaConsumers;  // of a tile of the result
template <class T>
inline constexpr int kWgmmaK = kSwizzleBytes / sizeof(T);  // of a stage
inline constexpr int kWgmmaSteps = kSwizzleBytes / 32;     // by wgmma, each 32 bytes of K
inline constexpr int kBoxBytes = 64 * kSwizzleBytes;       // of 64 rows
inline constexpr int kRingBytes = 192 << 10;
inline constexpr int kSwizzleAlignment = 1024;

static_assert(kWgmmaRows == kWgmmaTiles[0].M && kSwizzleBytes == kWgmmaStepBytes);

template <class T>
struct WgmmaWork {
  TensorMap a, relu_mask, b;
  bool masked;
  Tiling tiling;
  Epilogue<T> epilogue;
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

// kFragments: a is read into registers first, where its mask and the sums of its rows can be had; else the tensor cores
// read it from shared memory, which they do for an A along K only. Floats become TF32: those that the tensor cores
// read from shared memory, in the copy that brings them there; those of fragments, once they have been summed.
template <class T, Major kMajorA, Major kMajorB, bool kFragments, int kColumns>
struct WgmmaKernel {
  static_assert(kFragments || kMajorA == Major::k);
  static constexpr int kBytesA = kWgmmaRows * kSwizzleBytes, kBytesB = kColumns * kSwizzleBytes;
  static constexpr int kStageBytes = (kFragments ? 2 : 1) * kBytesA + kBytesB;
  static constexpr int kStages = kRingBytes / kStageBytes;
  static constexpr int kSharedBytes =
      kSwizzleAlignment + kStages * (kStageBytes + 2 * static_cast<int>(sizeof(Barrier)));
  static constexpr int kTiles = kColumns / 8;
  static constexpr int kK = kWgmmaK<T>;

  using Ring = RingPosition<kStages>;

  const WgmmaWork<T>& work;
  char* stages;
  Barrier *full, *empty;

  __device__ explicit WgmmaKernel(const WgmmaWork<T>& all_work) : work(all_work) {
    char* shared = shared_memory();
    stages = shared + (kSwizzleAlignment - shared_address(shared) % kSwizzleAlignment) % kSwizzleAlignment;
    full = reinterpret_cast<Barrier*>(stages + kStages * kStageBytes);
    empty = full + kStages;
  }

  // One item, a tile of C and a split of K, after the other: the cluster's own, and then every so many further.
  __device__ static int first_item() { return static_cast<int>(blockIdx.x / cluster_size()); }
  __device__ static int items_at_once() { return static_cast<int>(gridDim.x / cluster_size()); }
  __device__ int items() const { return work.tiling.row_tiles * work.tiling.column_tiles * work.tiling.splits; }
  __device__ static int first_row(const TileShare& share) {
    return (share.row * static_cast<int>(cluster_size()) + static_cast<int>(cluster_rank())) * kWgmmaRows;
  }
  __device__ static int steps_of(const TileShare& share) { return static_cast<int>((share.K + kK - 1) / kK); }

  // `outer` rows of an operand from `first` on, kK of K.
  template <Major kMajor>
  __device__ static void copy_operand(char* to, const TensorMap& map, int first, int outer, int k, Barrier& barrier,
                                      unsigned blocks) {
    if constexpr (kMajor == Major::k) {
      copy_box(to, map, k, first, barrier, blocks);
    } else {
      for (int i = 0; i < outer; i += kK) copy_box(to + i * kSwizzleBytes, map, first + i, k, barrier, blocks);
    }
  }

  __device__ void produce() {
    const unsigned cluster = cluster_size(), all = cluster == 1 ? 0 : (1u << cluster) - 1;
    const int share = kColumns / static_cast<int>(cluster), first_of_share = share * static_cast<int>(cluster_rank());
    const unsigned bytes = kBytesA + kBytesB + (work.masked ? kBytesA : 0);
    Ring ring;
    for (int i = first_item(); i < items(); i += items_at_once()) {
      const TileShare at = share_of(work.tiling, i);
      const int row = first_row(at), column = at.column * kColumns + first_of_share;
      for (int step = 0; step < steps_of(at); ++step, ring.advance()) {
        char* stage = stages + ring.stage * kStageBytes;
        Barrier& barrier = full[ring.stage];
        const int k = static_cast<int>(at.first_k) + step * kK;
        empty[ring.stage].wait(ring.parity ^ 1);
        barrier.arrive_expecting(bytes);
        copy_operand<kMajorA>(stage, work.a, row, kWgmmaRows, k, barrier, 0);
        copy_operand<kMajorB>(stage + kBytesA + first_of_share * kSwizzleBytes, work.b, column, share, k, barrier, all);
        if (work.masked) {
          copy_operand<kMajorA>(stage + kBytesA + kBytesB, work.relu_mask, row, kWgmmaRows, k, barrier, 0);
        }
      }
    }
  }

  // Every warp of the cluster that has read the stage says so to each block that copies into it.
  __device__ void release(int stage) {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) {
      for (unsigned rank = 0; rank < cluster_size(); ++rank) empty[stage].arrive_at(rank);
    }
  }

  __device__ static uint64_t descriptor_b(const char* stage, int step) {
    return wgmma_descriptor<kMajorB>(stage + kBytesA + step * (kMajorB == Major::k ? 32 : 16 * kSwizzleBytes));
  }

  // The tensor cores read both operands from shared memory; one stage is being multiplied while the next is started.
  __device__ void multiply(float (&sum)[kTiles][4], Ring& ring, int steps, int consumer) {
    int last = 0;
    for (int k = 0; k < steps; ++k, ring.advance()) {
      const char* stage = stages + ring.stage * kStageBytes;
      full[ring.stage].wait(ring.parity);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kWgmmaSteps; ++step) {
        wgmma<T, kMajorB>(sum, wgmma_descriptor<Major::k>(stage + consumer * kBoxBytes + 32 * step),
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

  // A warp's fragments of a for one stage, behind the mask.
  struct Fragments {
    uint32_t word[kWgmmaSteps][4];
  };

  // One step of K. Floats across K come in an order that `arrange` mends.
  __device__ void load(uint32_t (&a)[4], const char* tile, int step, int warp) const {
    const int lane = threadIdx.x % kWarp;
    if constexpr (kMajorA == Major::k) {
      const int row = 16 * warp + lane % 16, chunk = 2 * step + lane / 16;
      ldmatrix<false>(a, tile + row * kSwizzleBytes + (chunk ^ row % 8) * 16);
    } else if constexpr (sizeof(T) == 2) {
      const int row = 16 * step + lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
      ldmatrix<true>(a, tile + row * kSwizzleBytes + (chunk ^ row % 8) * 16);
    } else {
      // Lanes 4 r + c want columns r and r + 8 of rows c and c + 4. Were all to read the same quarter at once, rows 2 i
      // and 2 i + 1 would meet in one bank.
      const int r = lane / 4, c = lane % 4;
      const char* box = tile + warp / 2 * kK * kSwizzleBytes;  // of 32 columns
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
    full[ring.stage].wait(ring.parity);
#pragma unroll
    for (int step = 0; step < kWgmmaSteps; ++step) load(a.word[step], tile, step, warp);
    if (work.masked) {
#pragma unroll
      for (int step = 0; step < kWgmmaSteps; ++step) {
        uint32_t mask[4];
        load(mask, tile + kBytesA + kBytesB, step, warp);
#pragma unroll
        for (int i = 0; i < 4; ++i) a.word[step][i] = behind_mask<T>(a.word[step][i], mask[i]);
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
  __device__ void multiply_fragments(float (&sum)[kTiles][4], Ring& ring, int steps, int consumer, bool sums_rows,
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
      if (k + 1 < steps) load(next, ring, consumer, sums_rows, row_sums);
      wgmma_wait_group<0>();
      release(stage);
    };
    for (int k = 0; k < steps; k += 2) {
      multiply_stage(even, odd, k);
      if (k + 1 < steps) multiply_stage(odd, even, k + 1);
    }
  }

  __device__ void consume(int consumer) {
    Ring ring;
    for (int i = first_item(); i < items(); i += items_at_once()) {
      const TileShare at = share_of(work.tiling, i);
      float sum[kTiles][4];
      RowSums row_sums;
      const bool sums_rows = kFragments && work.epilogue.row_sums && at.column == 0;
      if constexpr (kFragments) {
        multiply_fragments(sum, ring, steps_of(at), consumer, sums_rows, row_sums);
      } else {
        multiply(sum, ring, steps_of(at), consumer);
      }
      const int row = first_row(at) + 64 * consumer + 16 * (threadIdx.x / kWarp % 4);
      store_fragments(work.epilogue, at.split, sum, row, at.column * kColumns);
      if (sums_rows) store_row_sums(work.epilogue, at.split, row_sums, row);
    }
  }

  __device__ void run() {
    if (threadIdx.x == 0) {
      prefetch_tensor_map(work.a);
      prefetch_tensor_map(work.b);
      for (int i = 0; i < kStages; ++i) {
        full[i].init(1);
        empty[i].init(4 * kWgmmaConsumers * cluster_size());
      }
      fence_barrier_init();
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

// Where the instructions are missing, the kernel is compiled for blocks too small to be launched with, by which
// has_wgmma knows.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr int kWgmmaLargestBlock = kWgmmaThreads;
#else
inline constexpr int kWgmmaLargestBlock = kWarp;
#endif

template <class T, Major kMajorA, Major kMajorB, bool kFragments, int kColumns>
__global__ void __launch_bounds__(kWgmmaLargestBlock, 1)
    product_wgmma_kernel(const __grid_constant__ WgmmaWork<T> work) {
  if constexpr (kWgmmaLargestBlock == kWgmmaThreads) {
    WgmmaKernel<T, kMajorA, kMajorB, kFragments, kColumns>(work).run();
  }
}

// A matrix copied so that the other index is contiguous.

inline constexpr int kTransposeSide = 32;
inline constexpr int kTransposeThreads = 256;

// to[c * to_stride + r] = from[r * from_stride + c]: through shared memory, so that reads and writes are coalesced.
// Grid: any.
template <class T>
__global__ void __launch_bounds__(kTransposeThreads)
    transpose_kernel(const T* from, int64_t rows, int64_t columns, int64_t from_stride, T* to, int64_t to_stride) {
  constexpr int kSide = kTransposeSide, kRowsAtOnce = kTransposeThreads / kSide;
  constexpr int kPitch = kSide + 1;  // so that a column of the tile meets each bank once
  T* tile = reinterpret_cast<T*>(shared_memory());
  const int64_t column_tiles = ceil_div(columns, kSide), tiles = ceil_div(rows, kSide) * column_tiles;
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
  constexpr int64_t kBlocks = 1 << 16;
  const int64_t tiles = ceil_div(rows, kTransposeSide) * ceil_div(columns, kTransposeSide);
  const Shape shape = {static_cast<unsigned>(tiles < kBlocks ? tiles : kBlocks), kTransposeThreads, 1,
                       kTransposeSide * (kTransposeSide + 1) * static_cast<int64_t>(sizeof(T))};
  launch("transpose", transpose_kernel<T>, shape, stream, from, rows, columns, from_stride, to, to_stride);
}

// Whether the device has these instructions, and this library code for them: plain sm_90's has none.
template <class T>
bool has_wgmma() {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) != 9) return false;
#ifdef __CUDACC__
  static const bool has_code = [] {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, product_wgmma_kernel<T, Major::k, Major::k, false, 128>),
          "cudaFuncGetAttributes");
    return attributes.maxThreadsPerBlock >= kWgmmaThreads;
  }();
  return has_code;
#else
  return true;
#endif
}

// In boxes of `box` by 128 bytes of K, or of 128 bytes by the K of a stage.
template <class T>
TensorMap boxes_of(const Operand<T>& operand, int64_t outer, int64_t K, int box, bool in_tf32) {
  const bool by_k = major_of(operand) == Major::k;
  const int64_t stride = (by_k ? operand.outer_stride : operand.k_stride) * static_cast<int64_t>(sizeof(T));
  return by_k ? tensor_map(operand.data, K, outer, stride, box, in_tf32)
              : tensor_map(operand.data, outer, K, stride, kWgmmaK<T>, in_tf32);
}

template <class T>
void launch_wgmma(const Product<T>& product, const Plan& plan, const Epilogue<T>& epilogue, void* copy_of_b,
                  cudaStream_t stream) {
  const int64_t M = product.M, N = product.N, K = product.K;
  const bool fragments = uses_fragments(product);
  Operand<T> b = product.b;
  if (transposes_b(product)) {
    b = transposed_b(product, copy_of_b);
    transpose(product.b.data, K, N, product.b.k_stride, static_cast<T*>(copy_of_b), b.outer_stride, stream);
  }
  const int cluster = static_cast<int>(plan.cluster);
  const TensorMap a = boxes_of(product.a, M, K, kWgmmaRows, !fragments);
  const WgmmaWork<T> work = {
      .a = a,
      .relu_mask = product.relu_mask.data ? boxes_of(product.relu_mask, M, K, kWgmmaRows, false) : a,
      .b = boxes_of(b, N, K, kWgmmaTiles[plan.tile].N / cluster, true),
      .masked = product.relu_mask.data != nullptr,
      .tiling = plan.tiling,
      .epilogue = epilogue};
  const unsigned at_once = static_cast<unsigned>(device_attribute(cudaDevAttrMultiProcessorCount)) / plan.cluster;
  const unsigned clusters = std::min(blocks_of(plan) / plan.cluster, std::max(at_once, 1u));
  const auto start = [&]<Major kMajorA, Major kMajorB, bool kFragments>() {
    const auto start_tile = [&]<int kColumns>() {
      launch("product wgmma", product_wgmma_kernel<T, kMajorA, kMajorB, kFragments, kColumns>,
             Shape{clusters * plan.cluster, kWgmmaThreads, plan.cluster,
                   WgmmaKernel<T, kMajorA, kMajorB, kFragments, kColumns>::kSharedBytes},
             stream, work);
    };
    plan.tile == 1 ? start_tile.template operator()<256>() : start_tile.template operator()<128>();
  };
  constexpr Major kMajorB = sizeof(T) == 4 ? Major::k : Major::outer;  // of the gradients
  if (!fragments && major_of(b) == Major::k) return start.template operator()<Major::k, Major::k, false>();
  if (!fragments) return start.template operator()<Major::k, kMajorB, false>();
  if (major_of(product.a) == Major::k) return start.template operator()<Major::k, kMajorB, true>();
  start.template operator()<Major::outer, kMajorB, true>();
}

}  // namespace mnist_ext::cuda
