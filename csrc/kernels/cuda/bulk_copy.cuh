// Bulk copies from global to shared memory (compute capability 9.0): one thread starts a copy, the copy engine makes
// it, and a barrier in shared memory counts the bytes that have come.
//
// Once: barrier.init() by one thread, then a barrier of the block. Then in turns: one thread announces all bytes of a
// round by expect(), bulk_copy() brings them, and every thread that reads them calls wait(round). A round begins when
// all have waited for the one before, and nobody reads what it overwrites any more. From the start of a copy until then
// the target holds nothing that may be read.
#pragma once

#include "device.cuh"

#ifndef __CUDACC__
#include <bulk_copy_emulator.h>
#endif

namespace mnist_ext::cuda {

struct alignas(8) CopyBarrier {
  uint64_t state;

  __device__ void init() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" : : "r"(address()) : "memory");
    // So that the copy engine sees it.
    asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
#elif !defined(__CUDACC__)
    emulator::init_copy_barrier(this);
#endif
  }

  __device__ void expect(unsigned bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(address()), "r"(bytes) : "memory");
#elif !defined(__CUDACC__)
    emulator::expect_copies(this, bytes);
#else
    static_cast<void>(bytes);
#endif
  }

  // Rounds are counted from 0.
  __device__ void wait(unsigned round) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    unsigned done;
    do {
      asm volatile(
          "{\n"
          ".reg .pred p;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n"
          "}\n"
          : "=r"(done)
          : "r"(address()), "r"(round % 2)
          : "memory");
    } while (!done);
#elif !defined(__CUDACC__)
    emulator::wait_for_round(this, round);
#else
    static_cast<void>(round);
#endif
  }

  __device__ unsigned address() const {
#ifdef __CUDA_ARCH__
    return static_cast<unsigned>(__cvta_generic_to_shared(this));
#else
    return 0;
#endif
  }
};

// Both addresses, and the number of bytes, are multiples of 16.
__device__ inline void bulk_copy(void* shared, const void* global, unsigned bytes, CopyBarrier* barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :
               : "r"(to), "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(barrier->address())
               : "memory");
#elif !defined(__CUDACC__)
  emulator::start_bulk_copy(shared, global, bytes, barrier);
#else
  static_cast<void>(shared), static_cast<void>(global), static_cast<void>(bytes), static_cast<void>(barrier);
#endif
}

}  // namespace mnist_ext::cuda
