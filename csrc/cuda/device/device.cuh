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
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
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

// Copies from global to shared memory that run beside the thread that started them (cp.async, compute capability 8.0).
// A thread starts copies, closes a group of them with cp_async_commit(), and waits with cp_async_wait<N>() until all
// but its N last groups have arrived. It then sees its own copies; others see them after a barrier behind that wait.
// From its start until then the target holds nothing that may be read.

// Both addresses are aligned to kBytes. Only the first valid_bytes are read; zeros take the place of the rest. With
// valid_bytes = 0 `global` may be any address.
template <int kBytes>
__device__ void cp_async(void* shared, const void* global, int valid_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef __CUDA_ARCH__
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const size_t from = __cvta_generic_to_global(global);
  if constexpr (kBytes == 16) {  // past L1: each block reads an element once
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :
                 : "r"(to), "l"(from), "r"(valid_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(to), "l"(from), "n"(kBytes), "r"(valid_bytes)
                 : "memory");
  }
#elif !defined(__CUDACC__)
  emulator::start_copy(shared, global, kBytes, valid_bytes);
#endif
}

__device__ inline void cp_async_commit() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" : : : "memory");
#elif !defined(__CUDACC__)
  emulator::commit_copies();
#endif
}

template <int kGroups>
__device__ void cp_async_wait() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" : : "n"(kGroups) : "memory");
#elif !defined(__CUDACC__)
  emulator::wait_for_copies(kGroups);
#endif
}

}  // namespace mnist_ext::cuda
