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

// The targets of a vector of positions, whose logits lie in a strip.
template <class T>
struct VectorOfTargets {
  using A = ComputeType<T>;
  using V = Register<T>;

  int64_t index[V::width];  // -1 where ignored
  V counts{};               // 1, or 0 where ignored
  V logit{};
  V weight{};

  template <class S>
  VectorOfTargets(const CrossEntropyProblem<T>& p, const Coefficients<T>& q, const S* logits, int64_t class_stride,
                  int64_t position, int lanes) {
    alignas(kVectorBytes) A counts_of[V::width] = {}, logits_of[V::width] = {}, weights_of[V::width] = {};
    for (int i = 0; i < lanes; ++i) {
      const int64_t t = p.target[position + i];
      index[i] = t == p.ignore_index ? -1 : t;
      if (index[i] < 0) continue;
      counts_of[i] = A(1);
      logits_of[i] = load_one(logits + t * class_stride + i);
      weights_of[i] = q.weight_of(t);
    }
    counts = V::load(counts_of);
    logit = V::load(logits_of);
    weight = V::load(weights_of);
  }
};

// One vector of positions, whose logits lie in `tile`, [classes][tile_width].
template <class T>
void forward_vector(const CrossEntropyForward<T>& x, const ColumnCoefficients<T>& coefficients,
                    const ComputeType<T>* tile, int64_t tile_width, int64_t position) {
  using A = ComputeType<T>;
  using V = Register<T>;
  const CrossEntropyProblem<T>& p = x.problem;
  const Coefficients<T>& q = coefficients.q;
  const int lanes = coefficients.lanes;
  const bool indexed = p.kind == TargetKind::indices;
  const auto logits = [&](int64_t c) __attribute__((always_inline)) { return V::load(tile + c * tile_width); };

  V max = V::broadcast(-std::numeric_limits<A>::infinity());
  for (int64_t c = 0; c < p.classes; ++c) max = mnist_ext::MNIST_EXT_ISA::max(logits(c), max);
  V log_sum =
      log(class_sum<T>(p.classes, [&](int64_t c) __attribute__((always_inline)) { return exp(logits(c) - max); }));
  V loss{};
  if (!indexed || q.smoothed) {
    loss = V{} - class_sum<T>(p.classes, [&](int64_t c) __attribute__((always_inline)) {
             return coefficients(c) * ((logits(c) - max) - log_sum);
           });
  }
  if (indexed) {
    const VectorOfTargets<T> targets(p, q, tile, tile_width, position, lanes);
    const V target_loss = (V{} - ((targets.logit - max) - log_sum)) * targets.weight;
    loss = q.smoothed ? fma(V::broadcast(q.target), target_loss, loss) : target_loss;
    max = where_positive(targets.counts, max);
    log_sum = where_positive(targets.counts, log_sum);
    loss = where_positive(targets.counts, loss);
  }
  store(x.position_max + position, max, lanes);
  store(x.position_log_sum + position, log_sum, lanes);
  store(x.position_loss + position, loss, lanes);
}

template <class T>
void forward_strip(const CrossEntropyForward<T>& x, const Coefficients<T>& q, const Strip& strip,
                   StripScores<const T> logits, StripScores<const T> probabilities) {
  using A = ComputeType<T>;
  const int64_t classes = x.problem.classes, width = strip_width<T>(classes);
  // A copy: read from memory once, though three times over, and not where power-of-two strides evict one another.
  A* tile = static_cast<A*>(scratch(Scratch::logits_tile, classes * width * sizeof(A)));
  for (int64_t c = 0; c < classes; ++c) {
    for_each_vector<T>(strip.size, [&](int64_t s, int lanes) __attribute__((always_inline)) {
      load(logits.data + c * logits.class_stride + s, lanes).store(tile + c * width + s);
    });
  }
  for_each_vector<T>(strip.size, [&](int64_t s, int lanes) {
    StripScores<const T> here = probabilities;
    if (here.data) here.data += s;
    forward_vector(x, ColumnCoefficients<T>{q, here, lanes}, tile + s, width, strip.position + s);
  });
}

// S: T, or ComputeType<T> for scores that have been widened already.
template <class T, class S>
void backward_vector_of_indices(const CrossEntropyBackward<T>& x, const Coefficients<T>& q,
                                const GradientScale<T>& scales, int64_t position, int lanes,
                                StripScores<const S> logits, StripScores<S> grad) {
  using A = ComputeType<T>;
  using V = Register<T>;
  const CrossEntropyProblem<T>& p = x.problem;
  const VectorOfTargets<T> targets(p, q, logits.data, logits.class_stride, position, lanes);
  const V scale = scales.vector(position, lanes);
  const V of_target = scale * V::broadcast(q.target) * targets.weight;
  const V of_all = q.smoothed ? fma(scale, V::broadcast(q.every_summed), of_target) : of_target;
  const V max = load(x.position_max + position, lanes), log_sum = load(x.position_log_sum + position, lanes);
  for (int64_t c = 0; c < p.classes; ++c) {
    V g = of_all * exp((load(logits.data + c * logits.class_stride, lanes) - max) - log_sum);
    if (q.smoothed) g = g - scale * V::broadcast(q.every * q.weight_of(c));
    store(grad.data + c * grad.class_stride, where_positive(targets.counts, g), lanes);
  }
  // The targets' own entries again: without smoothing from p - 1, so that they are not lost to rounding as p
  // approaches 1.
  const V p_target = exp((targets.logit - max) - log_sum);
  const V at_target = q.smoothed ? of_all * p_target - scale * V::broadcast(q.every) * targets.weight - of_target
                                 : of_target * (p_target - V::broadcast(A(1)));
  alignas(kVectorBytes) A at_targets[V::width];
  at_target.store(at_targets);
  for (int i = 0; i < lanes; ++i) {
    if (targets.index[i] >= 0) store_one(grad.data + targets.index[i] * grad.class_stride + i, at_targets[i]);
  }
}

// grad_logits and grad_probabilities: null where not wanted.
template <class T>
void backward_strip_of_probabilities(const CrossEntropyBackward<T>& x, const Coefficients<T>& q,
                                     const GradientScale<T>& scales, const Strip& strip, StripScores<const T> logits,
                                     StripScores<const T> probabilities, StripScores<T> grad_logits,
                                     StripScores<T> grad_probabilities) {
  using V = Register<T>;
  const CrossEntropyProblem<T>& p = x.problem;
  for_each_vector<T>(strip.size, [&](int64_t s, int lanes) {
    const StripScores<const T> here = {probabilities.data + s, probabilities.class_stride};
    const ColumnCoefficients<T> coefficients{q, here, lanes};
    const V scale = scales.vector(strip.position + s, lanes);
    const V max = load(x.position_max + strip.position + s, lanes);
    const V log_sum = load(x.position_log_sum + strip.position + s, lanes);
    const V of_all = scale * class_sum<T>(p.classes, coefficients);
    const V of_log_p = V{} - scale * V::broadcast(q.target);
    for (int64_t c = 0; c < p.classes; ++c) {
      const V log_p = (load(logits.data + c * logits.class_stride + s, lanes) - max) - log_sum;
      if (grad_logits.data) {
        store(grad_logits.data + c * grad_logits.class_stride + s, of_all * exp(log_p) - scale * coefficients(c),
              lanes);
      }
      if (grad_probabilities.data) {
        store(grad_probabilities.data + c * grad_probabilities.class_stride + s,
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

// This thread's share of positions that lie side by side.
template <class T>
void do_columns(const StripWork<T>& work, int thread, int threads) {
  const CrossEntropyProblem<T>& p = work.problem;
  const int64_t width = strip_width<T>(p.classes), strips = (p.positions + width - 1) / width;
  const Range share = split(p.batch * strips, 1, thread, threads);
  for (int64_t i = share.begin; i < share.end; ++i) {
    const int64_t batch = i / strips, begin = i % strips * width;
    const Strip strip = {batch * p.positions + begin, p.positions - begin < width ? p.positions - begin : width};
    const auto scores = [&](const ClassScores<const T>& s) -> StripScores<const T> {
      return {s.data + batch * s.batch_stride + begin, s.class_stride};
    };
    const auto gradient = [&](T* grad) -> StripScores<T> {
      return {grad ? grad + batch * p.classes * p.positions + begin : nullptr, p.positions};
    };
    const bool indexed = p.kind == TargetKind::indices;
    const StripScores<const T> logits = scores(p.logits);
    const StripScores<const T> probabilities = indexed ? StripScores<const T>{} : scores(p.probabilities);
    if (work.forward) forward_strip(*work.forward, work.q, strip, logits, probabilities);
    if (!work.backward) continue;
    const StripScores<T> grad_logits = gradient(work.backward->grad_logits);
    if (indexed) {
      for_each_vector<T>(strip.size, [&](int64_t s, int lanes) {
        backward_vector_of_indices<T, T>(*work.backward, work.q, work.scales, strip.position + s, lanes,
                                         {logits.data + s, logits.class_stride},
                                         {grad_logits.data + s, grad_logits.class_stride});
      });
    } else {
      backward_strip_of_probabilities(*work.backward, work.q, work.scales, strip, logits, probabilities, grad_logits,
                                      gradient(work.backward->grad_probabilities));
    }
  }
}

}  // namespace mnist_ext::MNIST_EXT_ISA
