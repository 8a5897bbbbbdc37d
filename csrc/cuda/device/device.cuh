// What every kernel stands on: CUDA itself, or, where a plain C++ compiler reads this, the emulator of tests/emulator.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include <cuda_emulator.h>
#endif

#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace mnist_ext::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffff;

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::ostringstream message;
  message << "mnist_ext: " << what << ": CUDA error: " << cudaGetErrorString(error);
  throw std::runtime_error(message.str());
}

struct Shape {
  unsigned blocks, threads;
  unsigned cluster = 1;      // blocks that run together and reach each other's shared memory
  int64_t shared_bytes = 0;  // of each block
};

// Starts a kernel on the stream; its name is for the error message.
template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), Shape shape, cudaStream_t stream,
            Parameters... parameters) {
  constexpr int64_t kWithoutAsking = 48 << 10;
  if (shape.shared_bytes > kWithoutAsking) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)),
          name);
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = shape.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, parameters...), name);
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// The block's dynamic shared memory, aligned to 16 bytes. Kernels have no other, so that the emulator needs none.
__device__ inline char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) char bytes[];
  return bytes;
#else
  return emulator::shared_memory();
#endif
}

// One access of sizeof(Vector) bytes, to which p is aligned.
template <class Vector>
__device__ Vector load_vector(const void* p) {
#ifndef __CUDACC__
  emulator::check_aligned(p, sizeof(Vector));
#endif
  return *static_cast<const Vector*>(p);
}

template <class Vector>
__device__ void store_vector(void* p, const Vector& value) {
#ifndef __CUDACC__
  emulator::check_aligned(p, sizeof(Vector));
#endif
  *static_cast<Vector*>(p) = value;
}

// Clusters exist from compute capability 9.0 on; older devices are never asked for one.
// A barrier of all threads of a cluster.
__device__ inline void cluster_sync() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
#endif
}

__device__ inline unsigned cluster_rank() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  return __clusterRelativeBlockRank();
#else
  return 0;
#endif
}

__device__ inline unsigned cluster_size() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  return __clusterSizeInBlocks();
#else
  return 1;
#endif
}

// Where a place in this block's shared memory is found in that of another block of the cluster.
template <class T>
__device__ T* shared_memory_of(unsigned rank, T* here) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  return static_cast<T*>(__cluster_map_shared_rank(here, rank));
#else
  return here;
#endif
}

}  // namespace mnist_ext::cuda
