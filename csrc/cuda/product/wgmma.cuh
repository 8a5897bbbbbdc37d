// The main loop of wgmma, on compute capability 9.0: docs/hopper-linear.md says why it is built so.
//
// A block stays on its multiprocessor and does one tile of C after the other. One of its threads, the producer, has
// tiles of the operands copied into a ring of stages in shared memory; two warpgroups, the consumers, multiply what is
// there, 64 rows of the tile each. A stage is handed over by two barriers: `full` ends a phase when the bytes have
// arrived, `empty` when every warp that reads them is through.
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

static_assert(kSwizzleBytes == kWgmmaStepBytes);

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
// read it from shared memory, which they do for an A along K only, and always for floats, which become TF32 in the copy
// that brings them there.
template <class T, Major kMajorA, Major kMajorB, bool kFragments, int kColumns>
struct WgmmaKernel {
  static_assert(kFragments ? sizeof(T) == 2 : kMajorA == Major::k);
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

  // One item, a tile of C and a split of K, after the other: the block's own, and then every so many further.
  __device__ int items() const { return work.tiling.row_tiles * work.tiling.column_tiles * work.tiling.splits; }
  __device__ static int steps_of(const TileShare& share) { return static_cast<int>((share.K + kK - 1) / kK); }

  // `outer` rows of an operand from `first` on, kK of K.
  template <Major kMajor>
  __device__ static void copy_operand(char* to, const TensorMap& map, int first, int outer, int k, Barrier& barrier) {
    if constexpr (kMajor == Major::k) {
      copy_box(to, map, k, first, barrier);
    } else {
      for (int i = 0; i < outer; i += kK) copy_box(to + i * kSwizzleBytes, map, first + i, k, barrier);
    }
  }

  __device__ void produce() {
    const unsigned bytes = kBytesA + kBytesB + (work.masked ? kBytesA : 0);
    Ring ring;
    for (int i = blockIdx.x; i < items(); i += gridDim.x) {
      const TileShare at = share_of(work.tiling, i);
      const int row = at.row * kWgmmaRows;
      for (int step = 0; step < steps_of(at); ++step, ring.advance()) {
        char* stage = stages + ring.stage * kStageBytes;
        Barrier& barrier = full[ring.stage];
        const int k = static_cast<int>(at.first_k) + step * kK;
        empty[ring.stage].wait(ring.parity ^ 1);
        barrier.arrive_expecting(bytes);
        copy_operand<kMajorA>(stage, work.a, row, kWgmmaRows, k, barrier);
        copy_operand<kMajorB>(stage + kBytesA, work.b, at.column * kColumns, kColumns, k, barrier);
        if (work.masked) copy_operand<kMajorA>(stage + kBytesA + kBytesB, work.relu_mask, row, kWgmmaRows, k, barrier);
      }
    }
  }

  // Every warp that has read the stage says so.
  __device__ void release(int stage) {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) empty[stage].arrive();
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

  // One step of K.
  __device__ void load(uint32_t (&a)[4], const char* tile, int step, int warp) const {
    const int lane = threadIdx.x % kWarp;
    if constexpr (kMajorA == Major::k) {
      const int row = 16 * warp + lane % 16, chunk = 2 * step + lane / 16;
      ldmatrix<false>(a, tile + row * kSwizzleBytes + (chunk ^ row % 8) * 16);
    } else {
      const int row = 16 * step + lane / 16 * 8 + lane % 8, chunk = 2 * warp + lane / 8 % 2;
      ldmatrix<true>(a, tile + row * kSwizzleBytes + (chunk ^ row % 8) * 16);
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
    if (sums_rows) {
      float part[2] = {};
#pragma unroll
      for (int step = 0; step < kWgmmaSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) part[i % 2] += sum_of_elements<T>(a.word[step][i]);
      }
      row_sums.add(part);
    }
  }

  // The other consumer's products fill the time in which fragments are fetched.
  __device__ void multiply_fragments(float (&sum)[kTiles][4], Ring& ring, int steps, int consumer, bool sums_rows,
                                     RowSums& row_sums) {
    for (int k = 0; k < steps; ++k, ring.advance()) {
      Fragments a;
      load(a, ring, consumer, sums_rows, row_sums);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < kWgmmaSteps; ++step) {
        wgmma<T, kMajorB>(sum, a.word[step], descriptor_b(stages + ring.stage * kStageBytes, step), k + step > 0);
      }
      wgmma_commit_group();
      wgmma_wait_group<0>();
      release(ring.stage);
    }
  }

  __device__ void consume(int consumer) {
    Ring ring;
    for (int i = blockIdx.x; i < items(); i += gridDim.x) {
      const TileShare at = share_of(work.tiling, i);
      float sum[kTiles][4];
      RowSums row_sums;
      const bool sums_rows = kFragments && work.epilogue.row_sums && at.column == 0;
      if constexpr (kFragments) {
        multiply_fragments(sum, ring, steps_of(at), consumer, sums_rows, row_sums);
      } else {
        multiply(sum, ring, steps_of(at), consumer);
      }
      const int row = at.row * kWgmmaRows + 64 * consumer + 16 * (threadIdx.x / kWarp % 4);
      store_fragments(work.epilogue, at.split, sum, row, at.column * kColumns);
      if (sums_rows) store_row_sums(work.epilogue, at.split, row_sums, row);
    }
  }

  __device__ void run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        full[i].init(1);
        empty[i].init(4 * kWgmmaConsumers);
      }
      fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x < kWarpgroup) {
      setmaxnreg_dec<56>();
      if (threadIdx.x == 0) produce();
    } else {
      setmaxnreg_inc<224>();
      consume(static_cast<int>(threadIdx.x) / kWarpgroup - 1);
    }
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
TensorMap boxes_of(const Operand<T>& operand, int64_t outer, int64_t K, int box) {
  const bool by_k = major_of(operand) == Major::k;
  const int64_t stride = (by_k ? operand.outer_stride : operand.k_stride) * static_cast<int64_t>(sizeof(T));
  return by_k ? tensor_map(operand.data, K, outer, stride, box)
              : tensor_map(operand.data, outer, K, stride, kWgmmaK<T>);
}

template <class T>
void launch_wgmma(const Product<T>& product, const Plan& plan, const Epilogue<T>& epilogue, cudaStream_t stream) {
  const int64_t M = product.M, N = product.N, K = product.K;
  const TensorMap a = boxes_of(product.a, M, K, kWgmmaRows);
  const WgmmaWork<T> work = {
      .a = a,
      .relu_mask = product.relu_mask.data ? boxes_of(product.relu_mask, M, K, kWgmmaRows) : a,
      .b = boxes_of(product.b, N, K, kMainLoops[static_cast<int>(MainLoop::wgmma)].tiles[plan.tile].N),
      .masked = product.relu_mask.data != nullptr,
      .tiling = plan.tiling,
      .epilogue = epilogue};
  const auto multiprocessors = static_cast<unsigned>(device_attribute(cudaDevAttrMultiProcessorCount));
  const unsigned blocks = std::min(blocks_of(plan), multiprocessors);
  const auto start = [&]<Major kMajorA, Major kMajorB, bool kFragments>() {
    const auto start_tile = [&]<int kColumns>() {
      launch("product wgmma", product_wgmma_kernel<T, kMajorA, kMajorB, kFragments, kColumns>,
             Shape{blocks, kWgmmaThreads, WgmmaKernel<T, kMajorA, kMajorB, kFragments, kColumns>::kSharedBytes}, stream,
             work);
    };
    plan.tile == 1 ? start_tile.template operator()<256>() : start_tile.template operator()<128>();
  };
  if (major_of(product.b) == Major::k) return start.template operator()<Major::k, Major::k, false>();
  if constexpr (sizeof(T) == 2) {
    if (!uses_fragments(product)) return start.template operator()<Major::k, Major::outer, false>();
    if (major_of(product.a) == Major::k) return start.template operator()<Major::k, Major::outer, true>();
    start.template operator()<Major::outer, Major::outer, true>();
  }
}

}  // namespace mnist_ext::cuda
