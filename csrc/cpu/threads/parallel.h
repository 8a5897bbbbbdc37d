// OpenMP, as far as the kernels use it.
#pragma once

#include <omp.h>

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

}  // namespace mnist_ext::MNIST_EXT_ISA
