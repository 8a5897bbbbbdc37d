// Stochastic gradient descent: one pass over each parameter, all parameters shared among the threads as if they were
// one.
#pragma once

#include "../api/backend.h"
#include "simd/elements.h"
#include "threads/parallel.h"

namespace mnist_ext::MNIST_EXT_ISA {

inline constexpr double kSgdGrain = 32768;  // elements that are worth a thread of their own

// What is left of x once it has been stored as T.
template <class T>
MNIST_EXT_INLINE Register<T> rounded(Register<T> x) {
  if constexpr (is_half<T>) {
    return widen_vector<T>(narrow_vector<T>(x));
  } else {
    return uncontracted(x);
  }
}

// The update of a vector of parameters.
template <class T>
struct SgdUpdate {
  using A = ComputeType<T>;
  using V = Register<T>;

  const SgdOptions& options;
  V minus_lr, weight_decay, of_gradient, nesterov, momentum;

  explicit SgdUpdate(const SgdOptions& o)
      : options(o),
        minus_lr(alpha(-o.lr)),
        weight_decay(alpha(o.weight_decay)),
        of_gradient(alpha(1 - o.dampening)),
        nesterov(alpha(o.momentum)),
        momentum(V::broadcast(static_cast<A>(o.momentum))) {}

  // PyTorch's add rounds its alpha to T, its mul does not round its factor.
  static V alpha(double x) {
    T rounded_alpha;
    store_one(&rounded_alpha, static_cast<A>(x));
    return V::broadcast(load_one(&rounded_alpha));
  }

  // The first `lanes` of param and buffer, which may be null, from their gradient.
  MNIST_EXT_INLINE void operator()(T* param, V g, T* buffer, int lanes) const {
    const V p = load(param, lanes);
    if (options.maximize) g = g * V::broadcast(A(-1));
    if (options.weight_decay != 0) g = rounded<T>(fma(p, weight_decay, g));
    if (buffer) {
      V b = g;
      if (!options.first_step) b = rounded<T>(fma(g, of_gradient, rounded<T>(load(buffer, lanes) * momentum)));
      store(buffer, b, lanes);
      g = options.nesterov ? rounded<T>(fma(b, nesterov, g)) : b;
    }
    store(param, fma(g, minus_lr, p), lanes);
  }
};

template <class T>
void sgd_range(const SgdTensor<T>& t, const SgdOptions& options, Range range) {
  const SgdUpdate<T> update(options);
  T* param = t.param + range.begin;
  const T* grad = t.grad + range.begin;
  T* buffer = t.momentum_buffer ? t.momentum_buffer + range.begin : nullptr;
  for_each_vector<T>(range.size(), [&](int64_t i, int lanes) __attribute__((always_inline)) {
    update(param + i, load(grad + i, lanes), buffer ? buffer + i : nullptr, lanes);
  });
}

template <class T>
void sgd_step(const SgdTensor<T>* tensors, int64_t count, const SgdOptions& options, const Launch& launch) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += tensors[i].size;
  parallel(threads_for(static_cast<double>(total), kSgdGrain, launch.threads), [&](int thread, int threads_used) {
    const Range share = split(total, Register<T>::width, thread, threads_used);
    int64_t begin = 0;  // of the tensor, among all elements
    for (int64_t i = 0; i < count; ++i) {
      const int64_t end = begin + tensors[i].size;
      const Range part = {share.begin > begin ? share.begin : begin, share.end < end ? share.end : end};
      if (part.size() > 0) sgd_range(tensors[i], options, {part.begin - begin, part.end - begin});
      begin = end;
    }
  });
}

}  // namespace mnist_ext::MNIST_EXT_ISA
