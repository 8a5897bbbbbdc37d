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
  return {max, static_cast<A>(std::log(sum)), static_cast<A>(1 / sum)};
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
  return {max, static_cast<A>(std::log(sum)), static_cast<A>(1 / sum)};
}

// The softmax of one row, a vector of classes at a time: from the logits and what the forward found,
template <class T>
struct RecomputedSoftmax {
  using V = Register<T>;

  const T* row;
  V max, log_sum;

  MNIST_EXT_INLINE V operator()(int64_t c, int lanes) const {
    constexpr auto lowest = -std::numeric_limits<ComputeType<T>>::infinity();
    return exp((load(row + c, lanes, lowest) - max) - log_sum);
  }
  MNIST_EXT_INLINE auto times(V factor) const {
    return [*this, factor](int64_t c, int lanes) __attribute__((always_inline)) { return factor * (*this)(c, lanes); };
  }
  ComputeType<T> at(int64_t c) const { return exp((V::broadcast(load_one(row + c)) - max) - log_sum).raw[0]; }
};

// or from exponentials that the forward kept: one exp per logit for both.
template <class T>
struct KeptSoftmax {
  using V = Register<T>;

  const ComputeType<T>* exponentials;
  V inverse_sum;

  MNIST_EXT_INLINE V operator()(int64_t c, int lanes) const { return load(exponentials + c, lanes) * inverse_sum; }
  MNIST_EXT_INLINE KeptSoftmax times(V factor) const { return {exponentials, factor * inverse_sum}; }
  ComputeType<T> at(int64_t c) const { return exponentials[c] * inverse_sum.raw[0]; }
};

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

// exponentials: to be kept there; or null.
template <class T>
RowSum<ComputeType<T>> forward_row(const CrossEntropyWork<T>& work, int64_t i, ComputeType<T>* exponentials) {
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
  const T* row = p.logits.data + i * p.logits.batch_stride;
  const RowSum<A> lse = exponentials ? row_exponentials(row, p.classes, exponentials) : row_log_sum_exp(row, p.classes);
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
  results.max[i] = lse.max;
  results.log_sum[i] = lse.log_sum;
  results.loss[i] = loss;
  return lse;
}

template <class T, class Softmax>
void backward_row_of_index(const CrossEntropyWork<T>& work, int64_t i, const Softmax& softmax) {
  using A = ComputeType<T>;
  using V = Register<T>;
  const CrossEntropyProblem<T>& p = work.problem;
  const CrossEntropyBackward<T>& args = *work.backward;
  const Coefficients<T>& q = work.q;
  T* grad = args.grad_logits + i * p.classes;
  const int64_t t = p.target[i];
  if (t == p.ignore_index) {
    std::memset(grad, 0, p.classes * sizeof(T));
    return;
  }
  const A scale = work.scales[i];
  const A of_target = scale * q.target * q.weight_of(t);
  const A of_all = q.smoothed ? of_target + scale * q.every_summed : of_target;
  const A p_target = softmax.at(t);
  const auto scaled_softmax = softmax.times(V::broadcast(of_all));
  const V scale_vector = V::broadcast(scale);
  const RowCoefficients<T> coefficients{q, nullptr};
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

template <class T, class Softmax>
void backward_row_of_probabilities(const CrossEntropyWork<T>& work, int64_t i, const Softmax& softmax) {
  using A = ComputeType<T>;
  using V = Register<T>;
  const CrossEntropyProblem<T>& p = work.problem;
  const CrossEntropyBackward<T>& args = *work.backward;
  const Coefficients<T>& q = work.q;
  const T* row = p.logits.data + i * p.logits.batch_stride;
  const RowCoefficients<T> coefficients{q, p.probabilities.data + i * p.probabilities.batch_stride};
  const A scale = work.scales[i];
  if (args.grad_logits) {
    T* grad = args.grad_logits + i * p.classes;
    const auto scaled_softmax =
        softmax.times(V::broadcast(scale * static_cast<A>(row_sum<T>(p.classes, coefficients))));
    const V scale_vector = V::broadcast(scale);
    for_each_vector<T>(p.classes, [&](int64_t c, int lanes) __attribute__((always_inline)) {
      store(grad + c, scaled_softmax(c, lanes) - uncontracted(scale_vector * coefficients(c, lanes)), lanes);
    });
  }
  if (args.grad_probabilities) {
    T* grad = args.grad_probabilities + i * p.classes;
    const V max = V::broadcast(args.position_max[i]), log_sum = V::broadcast(args.position_log_sum[i]);
    const V factor = V::broadcast(-scale * q.target);
    for_each_vector<T>(p.classes, [&](int64_t c, int lanes) __attribute__((always_inline)) {
      const V log_p = (load(row + c, lanes) - max) - log_sum;
      store(grad + c, factor * (q.weight ? log_p * load(q.weight + c, lanes) : log_p), lanes);
    });
  }
}

template <class T, class Softmax>
void backward_row(const CrossEntropyWork<T>& work, int64_t i, const Softmax& softmax) {
  if (work.problem.kind == TargetKind::indices) {
    backward_row_of_index(work, i, softmax);
  } else {
    backward_row_of_probabilities(work, i, softmax);
  }
}

template <class T>
void do_row(const CrossEntropyWork<T>& work, int64_t i) {
  using V = Register<T>;
  const CrossEntropyBackward<T>* backward = work.backward;
  if (!backward) {
    forward_row(work, i, nullptr);
  } else if (!work.forward) {
    const ClassScores<const T>& logits = work.problem.logits;
    const V max = V::broadcast(backward->position_max[i]), log_sum = V::broadcast(backward->position_log_sum[i]);
    backward_row(work, i, RecomputedSoftmax<T>{logits.data + i * logits.batch_stride, max, log_sum});
  } else {
    const int64_t classes = work.problem.classes;
    ComputeType<T>* exponentials;
    if constexpr (is_half<T>) {
      exponentials = static_cast<float*>(scratch(Scratch::exponentials, classes * sizeof(float)));
    } else {
      exponentials = backward->grad_logits + i * classes;  // which takes their place
    }
    const auto lse = forward_row<T>(work, i, exponentials);
    backward_row(work, i, KeptSoftmax<T>{exponentials, V::broadcast(lse.inverse_sum)});
  }
}

}  // namespace mnist_ext::MNIST_EXT_ISA
