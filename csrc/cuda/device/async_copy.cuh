// Copies from global to shared memory that run beside the thread that started them (cp.async, compute capability 8.0).
//
// A thread starts copies, closes a group of them with cp_async_commit(), and waits with cp_async_wait<N>() until all
// but its N last groups have arrived. It then sees its own copies; others see them after a barrier behind that wait.
// From its start until then the target holds nothing that may be read.
#pragma once

#include "device.cuh"

namespace mnist_ext::cuda {

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
