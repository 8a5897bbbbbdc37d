// Softmax cross-entropy where the positions lie side by side ([N, C, height, width]): a vector holds one class of
// neighbouring positions, so that sums over classes are sums of vectors and nothing is transposed.
#pragma once

#include "cross_entropy_parts.h"
#include "log.h"
#include "scratch.h"

namespace mnist_ext::MNIST_EXT_ISA {

// Positions are handled in strips, all classes of a strip at once. A strip is a few vectors wide, as far as its logits
// stay in the second-level cache.
inline constexpr int kStripVectors = 4;
inline constexpr int64_t kStripBytes = 256 * 1024;
// Terms that are added up in one chain.
inline constexpr int64_t kClassChain = 128;

template <class T>
int64_t strip_width(int64_t classes) {
  const int64_t fitting = kStripBytes / ((classes < 1 ? 1 : classes) * kVectorBytes);
  return (fitting < 1 ? 1 : fitting < kStripVectors ? fitting : kStripVectors) * Register<T>::width;
}

// Scores of neighbouring positions: element (class, position) lies at class * class_stride + position.
template <class T>
struct StripScores {
  T* data;
  int64_t class_stride;
};

struct Strip {
  int64_t position;  // the first one's index in [batch, positions]
  int64_t size;      // how many positions
};

// The sum over classes of f(class), in short chains.
template <class T, class F>
MNIST_EXT_INLINE Register<T> class_sum(int64_t classes, const F& f) {
  Register<T> total{};
  for (int64_t begin = 0; begin < classes; begin += kClassChain) {
    const int64_t end = classes - begin < kClassChain ? classes : begin + kClassChain;
    Register<T> sum{};
    for (int64_t c = begin; c < end; ++c) sum = sum + f(c);
    total = total + sum;
  }
  return total;
}

// q of a vector of positions, one class at a time, without the term of the target class.
template <class T>
struct ColumnCoefficients {
  using V = Register<T>;

  const Coefficients<T>& q;
  StripScores<const T> probabilities;  // from the first of these positions on, or null
  int lanes;

  MNIST_EXT_INLINE V operator()(int64_t c) const {
    V x = V::broadcast(q.every);
    if (probabilities.data) {
      x = fma(load(probabilities.data + c * probabilities.class_stride, lanes), V::broadcast(q.target), x);
    }
    return q.weight ? x * V::broadcast(load_one(q.weight + c)) : x;
  }
};

// The targets of a vector of positions. What belongs to the target class is picked by comparison while a loop passes
// all classes: no gather, no scatter. (32 bits of a class are enough: more classes than that do not fit into the
// strip.)
template <class T>
struct VectorOfTargets {
  using A = ComputeType<T>;
  using V = Register<T>;
  using Bits = typename V::Bits;

  typename V::RawBits index;  // -1 where ignored
  V counts{};                 // 1, or 0 where ignored

  VectorOfTargets(const CrossEntropyProblem<T>& p, int64_t position, int lanes) {
    alignas(kVectorBytes) Bits indices[V::width];
    for (int i = 0; i < V::width; ++i) {
      const int64_t t = i < lanes ? p.target[position + i] : p.ignore_index;
      indices[i] = t == p.ignore_index ? Bits(-1) : static_cast<Bits>(t);
    }
    std::memcpy(&index, indices, sizeof(index));
    const typename V::Raw none{};
    counts.raw = index == Bits(-1) ? none : none + A(1);
  }

  // x where c is the target, else y.
  MNIST_EXT_INLINE V pick(int64_t c, V x, V y) const { return {index == static_cast<Bits>(c) ? x.raw : y.raw}; }

  V weight(const Coefficients<T>& q, int64_t classes) const {
    V weight = V::broadcast(A(1));
    if (!q.weight) return weight;
    for (int64_t c = 0; c < classes; ++c) weight = pick(c, V::broadcast(q.weight_of(c)), weight);
    return weight;
  }
};

// Logits of a vector of positions, or their exponentials: class c at data + c * class_stride.
template <class A>
struct ColumnTile {
  A* data;
  int64_t class_stride;

  MNIST_EXT_INLINE Vec<std::remove_const_t<A>> operator()(int64_t c) const {
    return Vec<std::remove_const_t<A>>::load(data + c * class_stride);
  }
};

// One vector of positions. exponentials: exp(logit - max) to be kept there; or data null. Returns 1 / their sum.
template <class T>
Register<T> forward_vector(const CrossEntropyForward<T>& x, const ColumnCoefficients<T>& coefficients,
                           ColumnTile<const ComputeType<T>> logits, ColumnTile<ComputeType<T>> exponentials,
                           int64_t position) {
  using A = ComputeType<T>;
  using V = Register<T>;
  const CrossEntropyProblem<T>& p = x.problem;
  const Coefficients<T>& q = coefficients.q;
  const int lanes = coefficients.lanes;
  const bool indexed = p.kind == TargetKind::indices;

  V max = V::broadcast(-std::numeric_limits<A>::infinity());
  for (int64_t c = 0; c < p.classes; ++c) max = mnist_ext::MNIST_EXT_ISA::max(logits(c), max);
  const V sum = class_sum<T>(p.classes, [&](int64_t c) __attribute__((always_inline)) {
    const V e = exp(logits(c) - max);
    if (exponentials.data) e.store(exponentials.data + c * exponentials.class_stride);
    return e;
  });
  V log_sum = log(sum);
  V loss{};
  if (!indexed || q.smoothed) {
    loss = V{} - class_sum<T>(p.classes, [&](int64_t c) __attribute__((always_inline)) {
             return coefficients(c) * ((logits(c) - max) - log_sum);
           });
  }
  if (indexed) {
    const VectorOfTargets<T> targets(p, position, lanes);
    V logit{};
    for (int64_t c = 0; c < p.classes; ++c) logit = targets.pick(c, logits(c), logit);
    const V target_loss = (V{} - ((logit - max) - log_sum)) * targets.weight(q, p.classes);
    loss = q.smoothed ? fma(V::broadcast(q.target), target_loss, loss) : target_loss;
    max = where_positive(targets.counts, max);
    log_sum = where_positive(targets.counts, log_sum);
    loss = where_positive(targets.counts, loss);
  }
  store(x.position_max + position, max, lanes);
  store(x.position_log_sum + position, log_sum, lanes);
  store(x.position_loss + position, loss, lanes);
  return V::broadcast(A(1)) / sum;
}

// The softmax of a vector of positions, a class at a time: from the logits and what the forward found,
template <class T, class S>
struct RecomputedColumn {
  using V = Register<T>;

  StripScores<const S> logits;
  int lanes;
  V max, log_sum;

  RecomputedColumn(const CrossEntropyBackward<T>& x, StripScores<const S> strip, int64_t position, int n)
      : logits(strip),
        lanes(n),
        max(load(x.position_max + position, n)),
        log_sum(load(x.position_log_sum + position, n)) {}

  MNIST_EXT_INLINE V operator()(int64_t c) const {
    return exp((load(logits.data + c * logits.class_stride, lanes) - max) - log_sum);
  }
};

// or from exponentials that the forward kept.
template <class T>
struct KeptColumn {
  ColumnTile<ComputeType<T>> exponentials;
  Register<T> inverse_sum;

  MNIST_EXT_INLINE Register<T> operator()(int64_t c) const { return exponentials(c) * inverse_sum; }
};

// S: T, or ComputeType<T> for logits that were widened and gradients that are to be narrowed.
template <class T, class S, class Softmax>
void backward_vector_of_indices(const CrossEntropyBackward<T>& x, const Coefficients<T>& q,
                                const GradientScale<T>& scales, int64_t position, int lanes, const Softmax& softmax,
                                StripScores<S> grad) {
  using A = ComputeType<T>;
  using V = Register<T>;
  const CrossEntropyProblem<T>& p = x.problem;
  const VectorOfTargets<T> targets(p, position, lanes);
  const V scale = scales.vector(position, lanes);
  const V of_target = scale * V::broadcast(q.target) * targets.weight(q, p.classes);
  const V of_all = q.smoothed ? fma(scale, V::broadcast(q.every_summed), of_target) : of_target;
  for (int64_t c = 0; c < p.classes; ++c) {
    const V p_c = softmax(c);
    V g, at_target;
    if (q.smoothed) {
      g = of_all * p_c - scale * V::broadcast(q.every * q.weight_of(c));
      at_target = g - of_target;
    } else {
      g = of_all * p_c;
      at_target = of_target * (p_c - V::broadcast(A(1)));  // from p - 1: not lost to rounding as p approaches 1
    }
    g = where_positive(targets.counts, targets.pick(c, at_target, g));
    store(grad.data + c * grad.class_stride, g, lanes);
  }
}

// The parts of a strip's tensors, from its first position on; those not given or not wanted are null.
template <class T>
struct StripTensors {
  StripScores<const T> logits, probabilities;
  StripScores<T> grad_logits, grad_probabilities;
};

template <class T>
void backward_strip_of_probabilities(const CrossEntropyBackward<T>& x, const Coefficients<T>& q,
                                     const GradientScale<T>& scales, const Strip& strip, const StripTensors<T>& at) {
  using V = Register<T>;
  const CrossEntropyProblem<T>& p = x.problem;
  for_each_vector<T>(strip.size, [&](int64_t s, int lanes) {
    const StripScores<const T> probabilities = {at.probabilities.data + s, at.probabilities.class_stride};
    const ColumnCoefficients<T> coefficients{q, probabilities, lanes};
    const V scale = scales.vector(strip.position + s, lanes);
    const V max = load(x.position_max + strip.position + s, lanes);
    const V log_sum = load(x.position_log_sum + strip.position + s, lanes);
    const V of_all = scale * class_sum<T>(p.classes, coefficients);
    const V of_log_p = V{} - scale * V::broadcast(q.target);
    for (int64_t c = 0; c < p.classes; ++c) {
      const V log_p = (load(at.logits.data + c * at.logits.class_stride + s, lanes) - max) - log_sum;
      if (at.grad_logits.data) {
        store(at.grad_logits.data + c * at.grad_logits.class_stride + s, of_all * exp(log_p) - scale * coefficients(c),
              lanes);
      }
      if (at.grad_probabilities.data) {
        store(at.grad_probabilities.data + c * at.grad_probabilities.class_stride + s,
              of_log_p * (log_p * V::broadcast(q.weight_of(c))), lanes);
      }
    }
  });
}

// What to do with strips, for either op: forward if `forward` is given, then gradients if `backward` is.
template <class T>
struct StripWork {
  const CrossEntropyForward<T>* forward;
  const CrossEntropyBackward<T>* backward;
  const CrossEntropyProblem<T>& problem;
  const Coefficients<T>& q;
  const GradientScale<T>& scales;
};

template <class T>
void do_strip(const StripWork<T>& work, const Strip& strip, const StripTensors<T>& at) {
  using A = ComputeType<T>;
  constexpr int64_t vector = Register<T>::width;
  const int64_t classes = work.problem.classes, width = strip_width<T>(classes);
  const bool indexed = work.problem.kind == TargetKind::indices;
  const bool both = work.forward && work.backward && indexed;
  const auto grad = [&](int64_t s) -> StripScores<T> { return {at.grad_logits.data + s, at.grad_logits.class_stride}; };
  if (work.forward) {
    // A copy: read from memory once, though three times over, and not where power-of-two strides evict one another.
    A* tile = static_cast<A*>(scratch(Scratch::logits_tile, classes * width * sizeof(A)));
    for (int64_t c = 0; c < classes; ++c) {
      for_each_vector<T>(strip.size, [&](int64_t s, int lanes) __attribute__((always_inline)) {
        load(at.logits.data + c * at.logits.class_stride + s, lanes).store(tile + c * width + s);
      });
    }
    ColumnTile<A> kept{};
    if (both) kept = {static_cast<A*>(scratch(Scratch::exponentials, classes * vector * sizeof(A))), vector};
    for_each_vector<T>(strip.size, [&](int64_t s, int lanes) {
      StripScores<const T> probabilities = at.probabilities;
      if (probabilities.data) probabilities.data += s;
      const ColumnCoefficients<T> coefficients{work.q, probabilities, lanes};
      const auto inverse_sum = forward_vector(*work.forward, coefficients, {tile + s, width}, kept, strip.position + s);
      if (!both) return;
      backward_vector_of_indices<T, T>(*work.backward, work.q, work.scales, strip.position + s, lanes,
                                       KeptColumn<T>{kept, inverse_sum}, grad(s));
    });
  }
  if (!work.backward || both) return;
  if (indexed) {
    for_each_vector<T>(strip.size, [&](int64_t s, int lanes) {
      const StripScores<const T> logits = {at.logits.data + s, at.logits.class_stride};
      backward_vector_of_indices<T, T>(*work.backward, work.q, work.scales, strip.position + s, lanes,
                                       RecomputedColumn<T, T>(*work.backward, logits, strip.position + s, lanes),
                                       grad(s));
    });
  } else {
    backward_strip_of_probabilities(*work.backward, work.q, work.scales, strip, at);
  }
}

// This thread's share of positions that lie side by side.
template <class T>
void do_columns(const StripWork<T>& work, int thread, int threads) {
  const CrossEntropyProblem<T>& p = work.problem;
  const int64_t width = strip_width<T>(p.classes), strips = (p.positions + width - 1) / width;
  const Range share = split(p.batch * strips, 1, thread, threads);
  for (int64_t i = share.begin; i < share.end; ++i) {
    const int64_t batch = i / strips, begin = i % strips * width;
    const Strip strip = {batch * p.positions + begin, p.positions - begin < width ? p.positions - begin : width};
    StripTensors<T> at{};
    at.logits = {p.logits.data + batch * p.logits.batch_stride + begin, p.logits.class_stride};
    if (p.kind == TargetKind::probabilities) {
      at.probabilities = {p.probabilities.data + batch * p.probabilities.batch_stride + begin,
                          p.probabilities.class_stride};
    }
    const auto gradient = [&](T* grad) -> StripScores<T> {
      return {grad ? grad + batch * p.classes * p.positions + begin : nullptr, p.positions};
    };
    if (work.backward) {
      at.grad_logits = gradient(work.backward->grad_logits);
      at.grad_probabilities = gradient(work.backward->grad_probabilities);
    }
    do_strip(work, strip, at);
  }
}

}  // namespace mnist_ext::MNIST_EXT_ISA
