// Groups of threads that work on one row together: which of the grid's groups it is, what each one's share is, and sums
// and maxima over all of them. Every thread of a group gets the same bits, whatever order the threads ran in.
#pragma once

#include "device.cuh"

namespace mnist_ext::cuda {

struct Add {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return a + b;
  }
};

struct Max {  // of numbers; NaN counts as less than any
  template <class A>
  __device__ A operator()(A a, A b) const {
    return a != a || b > a ? b : a;
  }
};

struct Range {
  int64_t begin, end;

  __device__ int64_t size() const { return end - begin; }
};

template <class A, class Operation>
__device__ A reduce_warp(A x, Operation operation) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x = operation(x, __shfl_xor_sync(kAllLanes, x, distance));
  }
  return x;
}

struct OneThread {
  static constexpr bool kAlone = true;

  __device__ int rank() const { return 0; }
  __device__ int size() const { return 1; }
  __device__ bool leads() const { return true; }
  __device__ Range share(int64_t n) const { return {0, n}; }
  __device__ void sync() const {}
  template <class A, class Operation>
  __device__ A reduce(A x, Operation) const {
    return x;
  }
};

struct OneWarp {
  static constexpr bool kAlone = false;
  static constexpr unsigned kMaxThreads = 256;  // of a block of such groups
  static constexpr int kScratchBytes = kWarp * sizeof(double);

  __device__ static OneWarp in(char*) { return {}; }
  __device__ int index_in_block() const { return threadIdx.x / kWarp; }
  __device__ int64_t index() const { return int64_t{blockIdx.x} * (blockDim.x / kWarp) + index_in_block(); }
  __device__ int64_t count() const { return int64_t{gridDim.x} * (blockDim.x / kWarp); }

  __device__ int rank() const { return threadIdx.x % kWarp; }
  __device__ int size() const { return kWarp; }
  __device__ bool leads() const { return rank() == 0; }
  __device__ Range share(int64_t n) const { return {0, n}; }
  __device__ void sync() const { __syncwarp(); }
  template <class A, class Operation>
  __device__ A reduce(A x, Operation operation) const {
    return reduce_warp(x, operation);
  }
};

struct OneBlock {
  static constexpr bool kAlone = false;
  static constexpr unsigned kMaxThreads = 512;
  static constexpr int kScratchBytes = kWarp * sizeof(double);

  char* scratch;  // shared, kScratchBytes

  __device__ static OneBlock in(char* scratch) { return {scratch}; }
  __device__ int index_in_block() const { return 0; }
  __device__ int64_t index() const { return blockIdx.x; }
  __device__ int64_t count() const { return gridDim.x; }

  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return blockDim.x; }
  __device__ bool leads() const { return rank() == 0; }
  __device__ Range share(int64_t n) const { return {0, n}; }
  __device__ void sync() const { __syncthreads(); }
  template <class A, class Operation>
  __device__ A reduce(A x, Operation operation) const {
    A* of_warps = reinterpret_cast<A*>(scratch);
    const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
    x = reduce_warp(x, operation);
    if (lane == 0) of_warps[threadIdx.x / kWarp] = x;
    __syncthreads();
    A all = of_warps[0];
    for (int i = 1; i < warps; ++i) all = operation(all, of_warps[i]);
    __syncthreads();  // before the next reduction writes there
    return all;
  }
};

// The blocks of a cluster: each has its share of the row in its own shared memory.
struct OneCluster {
  static constexpr bool kAlone = false;
  static constexpr unsigned kMaxThreads = 512;
  static constexpr int kScratchBytes = 2 * OneBlock::kScratchBytes;

  char* scratch;  // shared, kScratchBytes

  __device__ static OneCluster in(char* scratch) { return {scratch}; }
  __device__ int index_in_block() const { return 0; }
  __device__ int64_t index() const { return blockIdx.x / cluster_size(); }
  __device__ int64_t count() const { return gridDim.x / cluster_size(); }

  __device__ OneBlock block() const { return {scratch}; }
  __device__ int rank() const { return threadIdx.x; }  // within the block, which walks over its share alone
  __device__ int size() const { return blockDim.x; }
  __device__ bool leads() const { return rank() == 0 && cluster_rank() == 0; }
  __device__ Range share(int64_t n) const {
    // Whole groups of 128 elements, so that each share is aligned as the row is.
    const int64_t each = ((n + cluster_size() - 1) / cluster_size() + 127) / 128 * 128;
    const int64_t begin = each * cluster_rank();
    return {begin < n ? begin : n, begin + each < n ? begin + each : n};
  }
  __device__ void sync() const { __syncthreads(); }
  template <class A, class Operation>
  __device__ A reduce(A x, Operation operation) const {
    A* of_block = reinterpret_cast<A*>(scratch + OneBlock::kScratchBytes);
    x = block().reduce(x, operation);
    if (threadIdx.x == 0) *of_block = x;
    cluster_sync();
    A all = *shared_memory_of(0, of_block);
    for (unsigned i = 1; i < cluster_size(); ++i) all = operation(all, *shared_memory_of(i, of_block));
    cluster_sync();  // before the next reduction writes there, or a block ends whose memory others read
    return all;
  }
};

}  // namespace mnist_ext::cuda
