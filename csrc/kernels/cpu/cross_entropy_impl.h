// Softmax cross-entropy: one pass over the logits forward, one more for the gradient.
#pragma once

#include <cmath>
#include <limits>

#include "../cross_entropy.h"
#include "exp.h"
#include "parallel.h"
#include "vec.h"

namespace mnist_ext::MNIST_EXT_ISA {

// Logits of a row that are handled at once: read from memory for their maximum, then again, from the first-level cache,
// for their exponentials.
inline constexpr int64_t kRowBlock = 2048;

inline constexpr double kCrossEntropyGrain = 16384;  // logits that are worth a thread of their own

// Calls body(vector, lanes, column) for the row's vectors; lanes behind the end hold `fill`.
template <class T, class Body>
MNIST_EXT_INLINE void for_each_vector(const T* row, int64_t n, T fill, const Body& body) {
  using V = Vec<T>;
  int64_t j = 0;
  for (; j + V::width <= n; j += V::width) body(V::load(row + j), V::width, j);
  if (j < n) body(V::load_partial(row + j, static_cast<int>(n - j), fill), static_cast<int>(n - j), j);
}

template <class T>
struct RowSum {
  T max;
  T log_sum;  // log(sum(exp(x - max)))
};

template <class T>
RowSum<T> row_log_sum_exp(const T* row, int64_t n) {
  using V = Vec<T>;
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  T max = lowest;
  double sum = 0;
  for (int64_t begin = 0; begin < n; begin += kRowBlock) {
    const int64_t size = n - begin < kRowBlock ? n - begin : kRowBlock;
    V block_max = V::broadcast(lowest);
    for_each_vector(row + begin, size, lowest, [&](V x, int, int64_t) __attribute__((always_inline)) {
      block_max = mnist_ext::MNIST_EXT_ISA::max(x, block_max);
    });
    const T new_max = reduce_max(block_max);
    if (new_max > max) {
      if (sum > 0) sum *= std::exp(static_cast<double>(max) - static_cast<double>(new_max));
      max = new_max;
    }
    if (max == lowest) {  // nothing but -inf and NaN so far: exp(x - max) would make NaN of both
      for (int64_t j = begin; j < begin + size; ++j) {
        if (row[j] != row[j]) sum = std::numeric_limits<double>::quiet_NaN();
      }
      continue;
    }
    V block_sum{};
    const V shift = V::broadcast(max);
    for_each_vector(row + begin, size, lowest,
                    [&](V x, int, int64_t) __attribute__((always_inline)) { block_sum = block_sum + exp(x - shift); });
    sum += static_cast<double>(reduce_add(block_sum));
  }
  return {max, static_cast<T>(std::log(sum))};
}

// Pairwise: the error grows with the logarithm of n.
template <class T>
double pairwise_sum(const T* x, int64_t n) {
  if (n <= 128) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += x[i];
    return sum;
  }
  const int64_t half = n / 2;
  return pairwise_sum(x, half) + pairwise_sum(x + half, n - half);
}

struct Targets {
  int64_t first_bad;  // the first row with a target that is neither ignored nor a class, or -1
  int64_t counted;    // rows that are not ignored, if none is bad
};

inline Targets check_targets(const int64_t* target, int64_t rows, int64_t classes, int64_t ignore_index) {
  int64_t counted = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (target[i] == ignore_index) continue;
    if (target[i] < 0 || target[i] >= classes) return {i, counted};
    ++counted;
  }
  return {-1, counted};
}

template <class T>
int64_t cross_entropy_forward(const CrossEntropyForward<T>& x, int threads) {
  const Targets targets = check_targets(x.target, x.rows, x.classes, x.ignore_index);
  if (targets.first_bad >= 0) return targets.first_bad;
  const double work = static_cast<double>(x.rows) * static_cast<double>(x.classes);
  parallel(threads_for(work, kCrossEntropyGrain, threads), [&](int thread, int count) {
    const Range rows = split(x.rows, 1, thread, count);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const int64_t t = x.target[i];
      if (t == x.ignore_index) {
        x.row_loss[i] = x.row_max[i] = x.row_log_sum[i] = T(0);
        continue;
      }
      const T* row = x.logits + i * x.logits_stride;
      const RowSum<T> lse = row_log_sum_exp(row, x.classes);
      x.row_max[i] = lse.max;
      x.row_log_sum[i] = lse.log_sum;
      x.row_loss[i] = -((row[t] - lse.max) - lse.log_sum);
    }
  });
  *x.total_weight = static_cast<T>(targets.counted);
  if (x.reduction != Reduction::none) {
    const double sum = pairwise_sum(x.row_loss, x.rows);
    *x.loss = static_cast<T>(x.reduction == Reduction::mean ? sum / static_cast<double>(targets.counted) : sum);
  }
  return -1;
}

template <class T>
int64_t cross_entropy_backward(const CrossEntropyBackward<T>& x, int threads) {
  using V = Vec<T>;
  const Targets targets = check_targets(x.target, x.rows, x.classes, x.ignore_index);
  if (targets.first_bad >= 0) return targets.first_bad;
  const T mean_scale = x.reduction == Reduction::mean ? *x.grad_output / *x.total_weight : T(0);
  const double work = static_cast<double>(x.rows) * static_cast<double>(x.classes);
  parallel(threads_for(work, kCrossEntropyGrain, threads), [&](int thread, int count) {
    const Range rows = split(x.rows, 1, thread, count);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      T* grad = x.grad_logits + i * x.classes;
      const int64_t t = x.target[i];
      if (t == x.ignore_index) {
        for (int64_t j = 0; j < x.classes; ++j) grad[j] = T(0);
        continue;
      }
      const T scale = x.reduction == Reduction::mean  ? mean_scale
                      : x.reduction == Reduction::sum ? *x.grad_output
                                                      : x.grad_output[i * x.grad_output_stride];
      const T* row = x.logits + i * x.logits_stride;
      const V max = V::broadcast(x.row_max[i]), log_sum = V::broadcast(x.row_log_sum[i]), s = V::broadcast(scale);
      for_each_vector(row, x.classes, T(0), [&](V logits, int lanes, int64_t j) __attribute__((always_inline)) {
        const V g = s * exp((logits - max) - log_sum);
        if (lanes == V::width) {
          g.store(grad + j);
        } else {
          g.store_partial(grad + j, lanes);
        }
      });
      // The target's own entry again from p - 1, so that it is not lost to rounding as p approaches 1.
      const T p = exp((V::broadcast(row[t]) - max) - log_sum).raw[0];
      grad[t] = scale * (p - T(1));
    }
  });
  return -1;
}

}  // namespace mnist_ext::MNIST_EXT_ISA
