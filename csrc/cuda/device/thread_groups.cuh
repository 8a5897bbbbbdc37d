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

template <class A, class Operation>
__device__ A reduce_warp(A x, Operation operation) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x = operation(x, __shfl_xor_sync(kAllLanes, x, distance));
  }
  return x;
}

struct OneThread {
  static constexpr bool kAlone = true;

  __device__ static OneThread in(char*) { return {}; }
  __device__ int rank() const { return 0; }
  __device__ int size() const { return 1; }
  template <class A, class Operation>
  __device__ A reduce(A x, Operation) const {
    return x;
  }
};

struct OneWarp {
  static constexpr bool kAlone = false;

  __device__ static OneWarp in(char*) { return {}; }
  __device__ int rank() const { return threadIdx.x % kWarp; }
  __device__ int size() const { return kWarp; }
  template <class A, class Operation>
  __device__ A reduce(A x, Operation operation) const {
    return reduce_warp(x, operation);
  }
};

struct OneBlock {
  static constexpr bool kAlone = false;
  static constexpr int kScratchBytes = kWarp * sizeof(double);

  char* scratch;  // shared, kScratchBytes

  __device__ static OneBlock in(char* scratch) { return {scratch}; }
  __device__ int rank() const { return threadIdx.x; }
  __device__ int size() const { return blockDim.x; }
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

}  // namespace mnist_ext::cuda
