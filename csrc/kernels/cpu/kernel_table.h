// One table of kernels per instruction set. Each is filled in the file compiled for that instruction set
// (kernels_<isa>.cpp); dispatch.cpp picks one at run time.
#pragma once

#include "../cross_entropy.h"
#include "../linear.h"
#include "../mlp.h"
#include "../sgd.h"
#include "../train_step.h"

namespace mnist_ext {

template <class T>
struct KernelsOf {
  void (*linear_forward)(const LinearForward<T>&, int threads);
  void (*linear_backward)(const LinearBackward<T>&, int threads);
  int64_t (*cross_entropy_forward)(const CrossEntropyForward<T>&, int threads);
  int64_t (*cross_entropy_backward)(const CrossEntropyBackward<T>&, int threads);
  void (*sgd_step)(const SgdTensor<T>*, int64_t count, const SgdOptions&, int threads);
  // Null for bfloat16 and float16:
  void (*mlp_forward)(const LinearForward<T>*, int64_t depth, int threads);
  void (*mlp_backward)(const LinearBackward<T>*, int64_t depth, int threads);
  int64_t (*train_steps)(const TrainSteps<T>&, int threads);
};

struct KernelTable : KernelsOf<float>, KernelsOf<double>, KernelsOf<BFloat16>, KernelsOf<Float16> {};

extern const KernelTable kernels_baseline;
#if defined(__x86_64__)
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
#endif

}  // namespace mnist_ext
