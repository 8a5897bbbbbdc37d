// Where the threads of one parallel region wait for each other.
#pragma once

#include <omp.h>
#include <sched.h>

#include "../simd/vec.h"
#include "parallel.h"

namespace mnist_ext::MNIST_EXT_ISA {

// Spins, as the phases of a training step last microseconds; after a while, or at once where there are more threads
// than cores, it lets others have the core, which may be what the last thread waits for. (Not std::atomic, whose
// functions the linker could take from another instruction set's file.)
class SpinBarrier {
 public:
  explicit SpinBarrier(int threads) : spins_(threads > processors() ? 0 : 4096) {}

  void wait(int threads) {
    if (threads == 1) return;
    const int phase = __atomic_load_n(&phase_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == threads) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&phase_, phase + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&phase_, __ATOMIC_ACQUIRE) == phase; ++spins) {
      if (spins < spins_) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        sched_yield();
      }
    }
  }

 private:
  static int processors() {
    static const int count = omp_get_num_procs();  // a system call
    return count;
  }

  const int spins_;
  alignas(64) int arrived_ = 0;
  alignas(64) int phase_ = 0;
};

// body(thread, count, barrier) on each of at most `threads` threads, which may wait for each other there. Before, each
// calls reserve(thread, count), which asks scratch() for all that body will: throws std::bad_alloc, without having
// called any body, if one of them could not get it.
template <class Reserve, class Body>
void parallel_in_phases(int threads, const Reserve& reserve, const Body& body) {
  SpinBarrier barrier(threads);
  bool failed = false;
  parallel(threads, [&](int thread, int count) {
    try {
      reserve(thread, count);
    } catch (...) {
      __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    }
    barrier.wait(count);
    if (!__atomic_load_n(&failed, __ATOMIC_RELAXED)) body(thread, count, barrier);
  });
  if (failed) scratch_failed();
}

}  // namespace mnist_ext::MNIST_EXT_ISA
