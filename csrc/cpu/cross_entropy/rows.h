// Softmax cross-entropy where the classes of a position are contiguous: a position is a row, read in vectors.
#pragma once

#include "../threads/scratch.h"
#include "terms.h"

namespace mnist_ext::MNIST_EXT_ISA {

// Logits of a row that are handled at once: read from memory for their maximum, then again, from the first-level cache,
// for their exponentials. These keep the core busy for longer than memory, so that what follows is prefetched
// meanwhile, more often than not the next row.
inline constexpr int64_t kRowBlock = 2048;

template <class A>
struct RowSum {
  A max;
  A log_sum;      // log(sum(exp(x - max)))
  A inverse_sum;  // 1 / sum(exp(x - max))
};

// Of the part of a row that was seen so far: the maximum, and the sum of exp(x - max).
template <class A>
struct RunningSum {
  A max = -std::numeric_limits<A>::infinity();
  double sum = 0;

  RowSum<A> result() const { return {max, static_cast<A>(std::log(sum)), static_cast<A>(1 / sum)}; }
};

// The same with the next n numbers of the row.
template <class T>
RunningSum<ComputeType<T>> add_to_sum(RunningSum<ComputeType<T>> so_far, const T* row, int64_t n) {
  using V = Register<T>;
  using A = ComputeType<T>;
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  auto [max, sum] = so_far;
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
      V nan{};
      for_each_vector<T>(size, [&](int64_t j, int lanes) __attribute__((always_inline)) {
        const V x = load(block + j, lanes);
        nan.raw = x.raw != x.raw ? x.raw : nan.raw;
      });
      sum += static_cast<double>(reduce_add(nan));
      continue;
    }
    V block_sum{};
    const V shift = V::broadcast(max);
    for_each_vector<T>(size, [&](int64_t j, int lanes) __attribute__((always_inline)) {
      prefetch(block + size + j);
      block_sum = block_sum + exp(load(block + j, lanes, lowest) - shift);
    });
    sum += static_cast<double>(reduce_add(block_sum));
  }
  return {max, sum};
}

template <class T>
RowSum<ComputeType<T>> row_log_sum_exp(const T* row, int64_t n) {
  return add_to_sum<T>({}, row, n).result();
}

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

// The same, with each exp(x - max) kept in `exponentials`. They must all be of the same maximum, so that the whole row
// is read for it first.
template <class T>
RowSum<ComputeType<T>> row_exponentials(const T* row, int64_t n, ComputeType<T>* exponentials) {
  using V = Register<T>;
  using A = ComputeType<T>;
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  V maximum = V::broadcast(lowest);
  for_each_vector<T>(n, [&](int64_t c, int lanes) __attribute__((always_inline)) {
    maximum = mnist_ext::MNIST_EXT_ISA::max(load(row + c, lanes, lowest), maximum);
  });
  const A max = reduce_max(maximum);
  const V shift = V::broadcast(max);
  const double sum = row_sum<T>(n, [&](int64_t c, int lanes) __attribute__((always_inline)) {
    prefetch(row + n + c);
    const V e = exp(load(row + c, lanes, lowest) - shift);
    store(exponentials + c, e, lanes);
    return e;
  });
  return RunningSum<A>{max, sum}.result();
}

// The classes of one position, in vectors.
template <class T>
struct Row {
  using V = Register<T>;

  int64_t classes;

  template <class S>
  static MNIST_EXT_INLINE S* at(const Scores<S>& scores, int64_t c) {
    return scores.data + c;
  }
  static MNIST_EXT_INLINE V weights(const T* weight, int64_t c, int lanes) { return load(weight + c, lanes); }
  static MNIST_EXT_INLINE V statistics(const ComputeType<T>* x) { return V::broadcast(*x); }
  template <class Body>
  MNIST_EXT_INLINE void for_each(const Body& body) const {
    for_each_vector<T>(classes, body);
  }
  template <class F>
  MNIST_EXT_INLINE V sum(const F& f) const {
    return V::broadcast(static_cast<ComputeType<T>>(row_sum<T>(classes, f)));
  }
};

// exponentials: to be kept there; or null.
template <class T>
RowSum<ComputeType<T>> forward_row(const CrossEntropyWork<T>& work, const PositionTensors<T>& at, int64_t i,
                                   ComputeType<T>* exponentials) {
  using A = ComputeType<T>;
  using V = Register<T>;
  const CrossEntropyProblem<T>& p = work.problem;
  const Coefficients<T>& q = work.q;
  const PositionResults<T>& results = *work.forward;
  const bool indexed = p.kind == TargetKind::indices;
  const int64_t t = indexed ? p.target[i] : 0;
  if (indexed && t == p.ignore_index) {
    results.loss[i] = results.max[i] = results.log_sum[i] = A(0);
    return {};
  }
  const T* row = at.logits.data;
  const A target_logit = indexed ? load_one(row + t) : A(0);  // exponentials may take the logits' place
  const RowSum<A> lse = exponentials ? row_exponentials(row, p.classes, exponentials) : row_log_sum_exp(row, p.classes);
  A loss = 0;
  if (!indexed || q.smoothed) {
    const VectorOfCoefficients<T, T, Row<T>> coefficients{q, at.probabilities, {p.classes}};
    const V max = V::broadcast(lse.max), log_sum = V::broadcast(lse.log_sum);
    loss = static_cast<A>(-row_sum<T>(p.classes, [&](int64_t c, int lanes) __attribute__((always_inline)) {
      return coefficients(c, lanes) * ((load(row + c, lanes) - max) - log_sum);
    }));
  }
  if (indexed) {
    const A target_loss = -((target_logit - lse.max) - lse.log_sum) * q.weight_of(t);
    loss = q.smoothed ? q.target * target_loss + loss : target_loss;
  }
  results.max[i] = lse.max;
  results.log_sum[i] = lse.log_sum;
  results.loss[i] = loss;
  return lse;
}

template <class T, class Softmax>
void backward_row_of_index(const CrossEntropyWork<T>& work, T* grad, const Softmax& softmax, int64_t i) {
  using A = ComputeType<T>;
  using V = Register<T>;
  const CrossEntropyProblem<T>& p = work.problem;
  const Coefficients<T>& q = work.q;
  const int64_t t = p.target[i];
  if (t == p.ignore_index) {
    std::memset(grad, 0, p.classes * sizeof(T));
    return;
  }
  const A scale = work.scales[i];
  const A of_target = scale * q.target * q.weight_of(t);
  const A of_all = q.smoothed ? of_target + scale * q.every_summed : of_target;
  const A p_target = softmax.of_class(t);
  const auto scaled_softmax = softmax.times(V::broadcast(of_all));
  const V scale_vector = V::broadcast(scale);
  const VectorOfCoefficients<T, T, Row<T>> coefficients{q, {}, {p.classes}};
  const bool smoothed = q.smoothed;  // read once: as far as the compiler knows, the stores might change q
  for_each_vector<T>(p.classes, [&](int64_t c, int lanes) __attribute__((always_inline)) {
    V g = scaled_softmax(c, lanes);
    if (smoothed) g = g - uncontracted(scale_vector * coefficients(c, lanes));
    store(grad + c, g, lanes);
  });
  // The target's own entry again: without smoothing from p - 1, so that it is not lost to rounding as p approaches 1.
  const A g =
      q.smoothed ? of_all * p_target - scale * q.every * q.weight_of(t) - of_target : of_target * (p_target - A(1));
  store_one(grad + t, g);
}

template <class T>
void do_row(const CrossEntropyWork<T>& work, int64_t i) {
  using V = Register<T>;
  const CrossEntropyBackward<T>* args = work.backward;
  const int64_t classes = work.problem.classes;
  const PositionTensors<T> at = tensors_at(work, i, 0);
  const Row<T> along{classes};
  const auto backward = [&](const auto& softmax) {
    if (work.problem.kind == TargetKind::indices) return backward_row_of_index(work, at.grad_logits.data, softmax, i);
    const V scale = V::broadcast(work.scales[i]), minus_scale = V::broadcast(-work.scales[i] * work.q.target);
    backward_of_probabilities(work, at, along, softmax, i, scale, minus_scale);
  };
  if (!args) {
    forward_row(work, at, i, nullptr);
  } else if (!work.forward) {
    backward(RecomputedSoftmax<T, T, Row<T>>(*args, at.logits, along, i));
  } else {
    ComputeType<T>* exponentials;
    if constexpr (is_half<T>) {
      exponentials = static_cast<float*>(scratch(Scratch::exponentials, classes * sizeof(float)));
    } else {
      exponentials = at.grad_logits.data;  // which takes their place
    }
    const auto lse = forward_row<T>(work, at, i, exponentials);
    backward(KeptSoftmax<T, Row<T>>{{exponentials, 1}, along, V::broadcast(lse.inverse_sum)});
  }
}

}  // namespace mnist_ext::MNIST_EXT_ISA
