// OpenMP, as far as the kernels use it, and a barrier of its threads.
#pragma once

#include <omp.h>
#include <sched.h>

#include <cstdint>

#include "../simd/vec.h"
#include "scratch.h"

namespace mnist_ext::MNIST_EXT_ISA {

struct Range {
  int64_t begin, end;
  MNIST_EXT_INLINE int64_t size() const { return end - begin; }
};

// The part-th of `parts` pieces of [0, n) that differ by one `unit` at most, cut at multiples of it.
MNIST_EXT_INLINE Range split(int64_t n, int64_t unit, int64_t part, int64_t parts) {
  const int64_t units = (n + unit - 1) / unit;
  const int64_t size = units / parts, larger = units % parts;  // the first `larger` pieces have one unit more
  const int64_t begin = (part * size + (part < larger ? part : larger)) * unit;
  const int64_t end = begin + (size + (part < larger ? 1 : 0)) * unit;
  return {begin < n ? begin : n, end < n ? end : n};
}

// At most `threads`, and no more than give each at least `grain` of `work`: a tiny shape does not pay for threads.
MNIST_EXT_INLINE int threads_for(double work, double grain, int threads) {
  if (MNIST_EXT_SANITIZED) return threads;
  const double wanted = work / grain;
  return wanted < threads ? (wanted < 1 ? 1 : static_cast<int>(wanted)) : threads;
}

// body(thread, count) on each of at most `threads` threads; inside another parallel region on the calling one alone.
template <class Body>
MNIST_EXT_INLINE void parallel(int threads, const Body& body) {
  if (threads <= 1) {
    body(0, 1);
    return;
  }
  bool failed = false;
#pragma omp parallel num_threads(threads)
  try {
    body(omp_get_thread_num(), omp_get_num_threads());
  } catch (...) {  // of all that a kernel calls, scratch() alone throws
#pragma omp atomic write
    failed = true;
  }
  if (failed) scratch_failed();
}

// Where the threads of a parallel region wait for each other. Spins, as the phases of a training step last
// microseconds; after a while, or at once where there are more threads than cores, it lets others have the core, which
// may be what the last thread waits for. (Not std::atomic, whose functions the linker could take from another
// instruction set's file.)
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
