// Softmax cross-entropy where the positions lie side by side ([N, C, height, width]): a vector holds one class of
// neighbouring positions, so that sums over classes are sums of vectors and nothing is transposed. Short rows are
// handled in the same way, a few vectors of them at a time, turned in the first-level cache.
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
  for (int i = 0; i < lanes && indexed; ++i) {
    const int64_t t = p.target[position + i];
    if (t == p.ignore_index) {
      max.raw[i] = log_sum.raw[i] = loss.raw[i] = A(0);
      continue;
    }
    const A target_loss = -((tile[t * tile_width + i] - max.raw[i]) - log_sum.raw[i]) * q.weight_of(t);
    loss.raw[i] = q.smoothed ? q.target * target_loss + loss.raw[i] : target_loss;
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

// What the gradient of a strip needs of each of its positions.
template <class T>
struct PositionFactors {
  using A = ComputeType<T>;
  static constexpr int64_t kSize = kStripVectors * Register<T>::width;

  alignas(64) A scale[kSize];         // the gradient of the position's loss
  alignas(64) A of_target[kSize];     // scale times the target's own term of q
  alignas(64) A of_all[kSize];        // scale times the sum of q
  alignas(64) A counts[kSize];        // 1, or 0 where ignored
  alignas(64) A target_logit[kSize];  // the logit of the target
};

template <class T>
void backward_strip_of_indices(const CrossEntropyBackward<T>& x, const Coefficients<T>& q,
                               const GradientScale<T>& scales, const Strip& strip, StripScores<const T> logits,
                               StripScores<T> grad) {
  using A = ComputeType<T>;
  using V = Register<T>;
  const CrossEntropyProblem<T>& p = x.problem;
  const A* max = x.position_max + strip.position;
  const A* log_sum = x.position_log_sum + strip.position;
  PositionFactors<T> of;
  for (int64_t s = 0; s < strip.size; ++s) {
    const int64_t t = p.target[strip.position + s];
    const bool counts = t != p.ignore_index;
    const A scale = counts ? scales[strip.position + s] : A(0);
    of.scale[s] = scale;
    of.of_target[s] = counts ? scale * q.target * q.weight_of(t) : A(0);
    of.of_all[s] = q.smoothed ? of.of_target[s] + scale * q.every_summed : of.of_target[s];
    of.counts[s] = counts ? A(1) : A(0);
    of.target_logit[s] = counts ? load_one(logits.data + t * logits.class_stride + s) : A(0);
  }
  for (int64_t c = 0; c < p.classes; ++c) {
    const V every = V::broadcast(q.every * q.weight_of(c));
    for_each_vector<T>(strip.size, [&](int64_t s, int lanes) __attribute__((always_inline)) {
      const V logit = load(logits.data + c * logits.class_stride + s, lanes);
      V g = load(of.of_all + s, lanes) * exp((logit - load(max + s, lanes)) - load(log_sum + s, lanes));
      if (q.smoothed) g = g - load(of.scale + s, lanes) * every;
      store(grad.data + c * grad.class_stride + s, where_positive(load(of.counts + s, lanes), g), lanes);
    });
  }
  // The targets' own entries again: without smoothing from p - 1, so that they are not lost to rounding as p
  // approaches 1.
  for_each_vector<T>(strip.size, [&](int64_t s, int lanes) {
    const V p_target = exp((load(of.target_logit + s, lanes) - load(max + s, lanes)) - load(log_sum + s, lanes));
    for (int i = 0; i < lanes; ++i) {
      const int64_t t = p.target[strip.position + s + i];
      if (t == p.ignore_index) continue;
      const A g = q.smoothed ? of.of_all[s + i] * p_target.raw[i] - of.scale[s + i] * q.every * q.weight_of(t) -
                                   of.of_target[s + i]
                             : of.of_target[s + i] * (p_target.raw[i] - A(1));
      store_one(grad.data + t * grad.class_stride + s + i, g);
    }
  });
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
    V scale{};
    for (int i = 0; i < lanes; ++i) scale.raw[i] = scales[strip.position + s + i];
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
      backward_strip_of_indices(*work.backward, work.q, work.scales, strip, logits, grad_logits);
    } else {
      backward_strip_of_probabilities(*work.backward, work.q, work.scales, strip, logits, probabilities, grad_logits,
                                      gradient(work.backward->grad_probabilities));
    }
  }
}

// Rows of up to this many classes are turned: a vector of theirs would be mostly empty, or its horizontal sums cost
// more than the turning.
template <class T>
inline constexpr int64_t kShortRow = 4 * Register<T>::width;

// This thread's share of short rows [batch, classes] with class indices.
template <class T>
void do_short_rows(const StripWork<T>& work, int thread, int threads) {
  const CrossEntropyProblem<T>& p = work.problem;
  const int64_t width = strip_width<T>(p.classes), elements = p.classes * width;
  T* turned = static_cast<T*>(scratch(Scratch::turned_rows, 2 * elements * sizeof(T)));
  T* turned_grad = turned + elements;
  const Range share = split(p.batch, width, thread, threads);
  for (int64_t begin = share.begin; begin < share.end; begin += width) {
    const Strip strip = {begin, share.end - begin < width ? share.end - begin : width};
    for (int64_t i = 0; i < strip.size; ++i) {
      const T* row = p.logits.data + (begin + i) * p.logits.batch_stride;
      for (int64_t c = 0; c < p.classes; ++c) turned[c * width + i] = row[c];
    }
    const StripScores<const T> logits = {turned, width};
    if (work.forward) forward_strip(*work.forward, work.q, strip, logits, {});
    if (!work.backward) continue;
    backward_strip_of_indices(*work.backward, work.q, work.scales, strip, logits, {turned_grad, width});
    T* grad = work.backward->grad_logits + begin * p.classes;
    for (int64_t i = 0; i < strip.size; ++i) {
      for (int64_t c = 0; c < p.classes; ++c) grad[i * p.classes + c] = turned_grad[c * width + i];
    }
  }
}

}  // namespace mnist_ext::MNIST_EXT_ISA
