// Softmax cross-entropy where the classes of a position lie side by side: a position is a row, read in vectors.
#pragma once

#include "cross_entropy_parts.h"

namespace mnist_ext::MNIST_EXT_ISA {

// Logits of a row that are handled at once: read from memory for their maximum, then again, from the first-level cache,
// for their exponentials.
inline constexpr int64_t kRowBlock = 2048;

template <class A>
struct RowSum {
  A max;
  A log_sum;  // log(sum(exp(x - max)))
};

template <class T>
RowSum<ComputeType<T>> row_log_sum_exp(const T* row, int64_t n) {
  using V = Register<T>;
  using A = ComputeType<T>;
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  A max = lowest;
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kRowBlock) {
    const int64_t size = n - begin < kRowBlock ? n - begin : kRowBlock;
    const T* block = row + begin;
    V block_max = V::broadcast(lowest);
    for_each_vector<T>(size, [&](int64_t j, int lanes) __attribute__((always_inline)) {
      block_max = mnist_ext::MNIST_EXT_ISA::max(load(block + j, lanes, lowest), block_max);
    });
    const A new_max = reduce_max(block_max);
    if (new_max > max) {
      if (sum > 0) sum *= std::exp(static_cast<double>(max) - static_cast<double>(new_max));
      max = new_max;
    }
    if (max == lowest) {  // nothing but -inf and NaN so far: exp(x - max) would make NaN of both
      for (int64_t j = 0; j < size; ++j) {
        const A x = load_one(block + j);
        if (x != x) sum = std::numeric_limits<double>::quiet_NaN();
      }
      continue;
    }
    V block_sum{};
    const V shift = V::broadcast(max);
    for_each_vector<T>(size, [&](int64_t j, int lanes) __attribute__((always_inline)) {
      block_sum = block_sum + exp(load(block + j, lanes, lowest) - shift);
    });
    sum += static_cast<double>(reduce_add(block_sum));
  }
  return {max, static_cast<A>(std::log(sum))};
}

// q of one row, a vector of classes at a time, without the term of the target class.
template <class T>
struct RowCoefficients {
  using V = Register<T>;

  const Coefficients<T>& q;
  const T* probabilities;  // of this row, or null

  MNIST_EXT_INLINE V operator()(int64_t c, int lanes) const {
    V x = V::broadcast(q.every);
    if (probabilities) x = fma(load(probabilities + c, lanes), V::broadcast(q.target), x);
    return q.weight ? x * load(q.weight + c, lanes) : x;
  }
};

// The sum of f(class, lanes) over the classes: a block at a time in vectors, then in double.
template <class T, class F>
MNIST_EXT_INLINE double row_sum(int64_t classes, const F& f) {
  using V = Register<T>;
  double total = 0;
  for (int64_t begin = 0; begin < classes; begin += kRowBlock) {
    V sum{};
    for_each_vector<T>(classes - begin < kRowBlock ? classes - begin : kRowBlock,
                       [&](int64_t j, int lanes) __attribute__((always_inline)) {
                         const V x = f(begin + j, lanes);
                         sum = sum + (lanes == V::width ? x : first_lanes(x, lanes));
                       });
    total += static_cast<double>(reduce_add(sum));
  }
  return total;
}

template <class T>
void forward_row(const CrossEntropyForward<T>& x, const Coefficients<T>& q, int64_t i) {
  using A = ComputeType<T>;
  using V = Register<T>;
  const CrossEntropyProblem<T>& p = x.problem;
  const bool indexed = p.kind == TargetKind::indices;
  const int64_t t = indexed ? p.target[i] : 0;
  if (indexed && t == p.ignore_index) {
    x.position_loss[i] = x.position_max[i] = x.position_log_sum[i] = A(0);
    return;
  }
  const T* row = p.logits.data + i * p.logits.batch_stride;
  const RowSum<A> lse = row_log_sum_exp(row, p.classes);
  A loss = 0;
  if (!indexed || q.smoothed) {
    const T* probabilities = indexed ? nullptr : p.probabilities.data + i * p.probabilities.batch_stride;
    const RowCoefficients<T> coefficients{q, probabilities};
    const V max = V::broadcast(lse.max), log_sum = V::broadcast(lse.log_sum);
    loss = static_cast<A>(-row_sum<T>(p.classes, [&](int64_t c, int lanes) __attribute__((always_inline)) {
      return coefficients(c, lanes) * ((load(row + c, lanes) - max) - log_sum);
    }));
  }
  if (indexed) {
    const A target_loss = -((load_one(row + t) - lse.max) - lse.log_sum) * q.weight_of(t);
    loss = q.smoothed ? q.target * target_loss + loss : target_loss;
  }
  x.position_max[i] = lse.max;
  x.position_log_sum[i] = lse.log_sum;
  x.position_loss[i] = loss;
}

template <class T>
void backward_row_of_index(const CrossEntropyBackward<T>& x, const Coefficients<T>& q, const GradientScale<T>& scales,
                           int64_t i) {
  using A = ComputeType<T>;
  using V = Register<T>;
  const CrossEntropyProblem<T>& p = x.problem;
  T* grad = x.grad_logits + i * p.classes;
  const int64_t t = p.target[i];
  if (t == p.ignore_index) {
    std::memset(grad, 0, p.classes * sizeof(T));
    return;
  }
  const A scale = scales[i];
  const A of_target = scale * q.target * q.weight_of(t);
  const A of_all = q.smoothed ? of_target + scale * q.every_summed : of_target;
  const T* row = p.logits.data + i * p.logits.batch_stride;
  const V max = V::broadcast(x.position_max[i]), log_sum = V::broadcast(x.position_log_sum[i]);
  const V factor = V::broadcast(of_all), scale_vector = V::broadcast(scale);
  const RowCoefficients<T> coefficients{q, nullptr};
  for_each_vector<T>(p.classes, [&](int64_t c, int lanes) __attribute__((always_inline)) {
    V g = factor * exp((load(row + c, lanes) - max) - log_sum);
    if (q.smoothed) g = g - scale_vector * coefficients(c, lanes);
    store(grad + c, g, lanes);
  });
  // The target's own entry again: without smoothing from p - 1, so that it is not lost to rounding as p approaches 1.
  const A p_target = exp((V::broadcast(load_one(row + t)) - max) - log_sum).raw[0];
  const A g =
      q.smoothed ? of_all * p_target - scale * q.every * q.weight_of(t) - of_target : of_target * (p_target - A(1));
  store_one(grad + t, g);
}

template <class T>
void backward_row_of_probabilities(const CrossEntropyBackward<T>& x, const Coefficients<T>& q,
                                   const GradientScale<T>& scales, int64_t i) {
  using A = ComputeType<T>;
  using V = Register<T>;
  const CrossEntropyProblem<T>& p = x.problem;
  const T* row = p.logits.data + i * p.logits.batch_stride;
  const RowCoefficients<T> coefficients{q, p.probabilities.data + i * p.probabilities.batch_stride};
  const A scale = scales[i];
  const V max = V::broadcast(x.position_max[i]), log_sum = V::broadcast(x.position_log_sum[i]);
  if (x.grad_logits) {
    T* grad = x.grad_logits + i * p.classes;
    const V factor = V::broadcast(scale * static_cast<A>(row_sum<T>(p.classes, coefficients)));
    const V scale_vector = V::broadcast(scale);
    for_each_vector<T>(p.classes, [&](int64_t c, int lanes) __attribute__((always_inline)) {
      const V probability = exp((load(row + c, lanes) - max) - log_sum);
      store(grad + c, factor * probability - scale_vector * coefficients(c, lanes), lanes);
    });
  }
  if (x.grad_probabilities) {
    T* grad = x.grad_probabilities + i * p.classes;
    const V factor = V::broadcast(-scale * q.target);
    for_each_vector<T>(p.classes, [&](int64_t c, int lanes) __attribute__((always_inline)) {
      const V log_p = (load(row + c, lanes) - max) - log_sum;
      store(grad + c, factor * (q.weight ? log_p * load(q.weight + c, lanes) : log_p), lanes);
    });
  }
}

}  // namespace mnist_ext::MNIST_EXT_ISA
