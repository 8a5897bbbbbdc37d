// Softmax cross-entropy where the positions are contiguous ([N, C, height, width]): a vector holds one class of
// neighbouring positions, so that sums over classes are sums of vectors and nothing is transposed.
#pragma once

#include "../threads/scratch.h"
#include "terms.h"

namespace mnist_ext::MNIST_EXT_ISA {

// Positions are handled in strips, all classes of a strip at once. A strip is a few vectors wide, as far as its logits
// stay in the second-level cache.
inline constexpr int kStripVectors = 4;
inline constexpr int64_t kStripBytes = 256 * 1024;
// Terms that are added up before their sum joins the total.
inline constexpr int64_t kClassBlock = 128;

template <class T>
int64_t strip_width(int64_t classes) {
  const int64_t fitting = kStripBytes / ((classes < 1 ? 1 : classes) * kVectorBytes);
  return (fitting < 1 ? 1 : fitting < kStripVectors ? fitting : kStripVectors) * Register<T>::width;
}

// Scores of neighbouring positions: element (class, position) lies at class * class_stride + position; or data is null.
template <class T>
struct StripScores {
  T* data;
  int64_t class_stride;

  StripScores from(int64_t position) const { return {data ? data + position : nullptr, class_stride}; }
};

// The parts of a strip's tensors, from its first position on; those not given or not wanted are null. S: the tensors'
// type, or its ComputeType for scores that were widened and gradients that are to be narrowed.
template <class S>
struct StripTensors {
  StripScores<const S> logits, probabilities;
  StripScores<S> grad_logits, grad_probabilities;

  StripTensors from(int64_t position) const {
    return {logits.from(position), probabilities.from(position), grad_logits.from(position),
            grad_probabilities.from(position)};
  }
};

struct Strip {
  int64_t position;  // the first one's index in [batch, positions]
  int64_t size;      // how many positions
};

// The sum over classes of f(class): four independent chains in each block, which round less than one.
template <class T, class F>
MNIST_EXT_INLINE Register<T> class_sum(int64_t classes, const F& f) {
  using V = Register<T>;
  V total{};
  for (int64_t begin = 0; begin < classes; begin += kClassBlock) {
    const int64_t end = classes - begin < kClassBlock ? classes : begin + kClassBlock;
    V sums[4] = {};
    int64_t c = begin;
    for (; c + 4 <= end; c += 4) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sums[k] = sums[k] + f(c + k);
    }
    for (; c < end; ++c) sums[3] = sums[3] + f(c);
    total = total + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return total;
}

// q of a vector of positions, one class at a time, without the term of the target class.
template <class T, class S>
struct ColumnCoefficients {
  using V = Register<T>;

  const Coefficients<T>& q;
  StripScores<const S> probabilities;  // from the first of these positions on, or null
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
template <class T, class S>
Register<T> forward_vector(const CrossEntropyProblem<T>& p, const PositionResults<T>& results,
                           const ColumnCoefficients<T, S>& coefficients, ColumnTile<const ComputeType<T>> logits,
                           ColumnTile<ComputeType<T>> exponentials, int64_t position) {
  using A = ComputeType<T>;
  using V = Register<T>;
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
  store(results.max + position, max, lanes);
  store(results.log_sum + position, log_sum, lanes);
  store(results.loss + position, loss, lanes);
  return V::broadcast(A(1)) / sum;
}

// The softmax of a vector of positions, a class at a time: from the logits and what the forward found,
template <class T, class S>
struct RecomputedColumn {
  using V = Register<T>;

  StripScores<const S> logits;
  int lanes;
  V max, log_sum;

  RecomputedColumn(const CrossEntropyBackward<T>& args, StripScores<const S> strip, int64_t position, int n)
      : logits(strip),
        lanes(n),
        max(load(args.position_max + position, n)),
        log_sum(load(args.position_log_sum + position, n)) {}

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

// By value, here and below: as far as the compiler knows, the stores might change what lies behind a reference.
template <class T, class S, class Softmax>
MNIST_EXT_INLINE void backward_vector_of_indices(const CrossEntropyWork<T>& work, int64_t position, int lanes,
                                                 Softmax softmax, StripScores<S> grad) {
  using A = ComputeType<T>;
  using V = Register<T>;
  const CrossEntropyProblem<T>& p = work.problem;
  const Coefficients<T>& q = work.q;
  const int64_t classes = p.classes;
  const bool smoothed = q.smoothed;
  const VectorOfTargets<T> targets(p, position, lanes);
  const V scale = work.scales.vector(position, lanes);
  const V of_target = scale * V::broadcast(q.target) * targets.weight(q, classes);
  const V of_all = smoothed ? fma(scale, V::broadcast(q.every_summed), of_target) : of_target;
  for (int64_t c = 0; c < classes; ++c) {
    const V p_c = softmax(c);
    V g, at_target;
    if (smoothed) {
      g = of_all * p_c - uncontracted(scale * V::broadcast(q.every * q.weight_of(c)));
      at_target = g - of_target;
    } else {
      g = of_all * p_c;
      at_target = of_target * (p_c - V::broadcast(A(1)));  // from p - 1: not lost to rounding as p approaches 1
    }
    g = where_positive(targets.counts, targets.pick(c, at_target, g));
    store(grad.data + c * grad.class_stride, g, lanes);
  }
}

template <class T, class S, class Softmax>
MNIST_EXT_INLINE void backward_vector_of_probabilities(const CrossEntropyWork<T>& work, int64_t position, int lanes,
                                                       Softmax softmax, StripTensors<S> at) {
  using V = Register<T>;
  const Coefficients<T>& q = work.q;
  const int64_t classes = work.problem.classes;
  const ColumnCoefficients<T, S> coefficients{q, at.probabilities, lanes};
  const V scale = work.scales.vector(position, lanes);
  if (at.grad_logits.data) {
    const V of_all = scale * class_sum<T>(classes, coefficients);
    for (int64_t c = 0; c < classes; ++c) {
      const V g = of_all * softmax(c) - uncontracted(scale * coefficients(c));
      store(at.grad_logits.data + c * at.grad_logits.class_stride, g, lanes);
    }
  }
  if (at.grad_probabilities.data) {
    const V max = load(work.backward->position_max + position, lanes);
    const V log_sum = load(work.backward->position_log_sum + position, lanes);
    const V factor = V{} - scale * V::broadcast(q.target);
    for (int64_t c = 0; c < classes; ++c) {
      const V log_p = (load(at.logits.data + c * at.logits.class_stride, lanes) - max) - log_sum;
      const V g = factor * (log_p * V::broadcast(q.weight_of(c)));
      store(at.grad_probabilities.data + c * at.grad_probabilities.class_stride, g, lanes);
    }
  }
}

// One vector of positions; inlined, so that `lanes` is a constant for all but the last. widened: the logits, for the
// forward; kept: room for exponentials, for both.
template <class T, class S>
MNIST_EXT_INLINE void do_vector(const CrossEntropyWork<T>& work, int64_t position, int lanes, const StripTensors<S>& at,
                                ColumnTile<const ComputeType<T>> widened, ColumnTile<ComputeType<T>> kept) {
  const auto backward = [&](const auto& softmax) __attribute__((always_inline)) {
    if (work.problem.kind == TargetKind::indices) {
      backward_vector_of_indices(work, position, lanes, softmax, at.grad_logits);
    } else {
      backward_vector_of_probabilities(work, position, lanes, softmax, at);
    }
  };
  if (work.forward) {
    const ColumnCoefficients<T, S> coefficients{work.q, at.probabilities, lanes};
    const auto inverse_sum = forward_vector(work.problem, *work.forward, coefficients, widened, kept, position);
    if (work.backward) backward(KeptColumn<T>{kept, inverse_sum});
  } else {
    backward(RecomputedColumn<T, S>(*work.backward, at.logits, position, lanes));
  }
}

template <class T>
void do_strip(const CrossEntropyWork<T>& work, const Strip& strip, const StripTensors<T>& at) {
  using A = ComputeType<T>;
  constexpr int64_t vector = Register<T>::width;
  const int64_t classes = work.problem.classes, width = strip_width<T>(classes);
  StripScores<A> tile{};
  ColumnTile<A> kept{};
  if (work.forward) {
    // A copy: read from memory once, though three times over, and not where power-of-two strides evict one another.
    tile = {static_cast<A*>(scratch(Scratch::logits_tile, classes * width * sizeof(A))), width};
    for (int64_t c = 0; c < classes; ++c) {
      for_each_vector<T>(strip.size, [&](int64_t s, int lanes) __attribute__((always_inline)) {
        load(at.logits.data + c * at.logits.class_stride + s, lanes).store(tile.data + c * width + s);
      });
    }
    if (work.backward) {
      kept = {static_cast<A*>(scratch(Scratch::exponentials, classes * vector * sizeof(A))), vector};
    }
  }
  for_each_vector<T>(strip.size, [&](int64_t s, int lanes) __attribute__((always_inline)) {
    do_vector(work, strip.position + s, lanes, at.from(s), {tile.from(s).data, width}, kept);
  });
}

// This thread's share of contiguous positions.
template <class T>
void do_columns(const CrossEntropyWork<T>& work, int thread, int threads) {
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
