// Softmax cross-entropy where the positions lie side by side ([N, C, height, width]): a vector holds one class of
// neighbouring positions, so that sums over classes are sums of vectors and nothing is transposed.
#pragma once

#include "cross_entropy_parts.h"
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

// Neighbouring positions of one item of the batch.
struct Strip {
  int64_t batch;
  int64_t begin;     // its first position
  int64_t size;      // how many
  int64_t position;  // the first one's index in [batch, positions]
};

// Calls body(strip) for this thread's share of all strips.
template <class T, class Body>
void for_each_strip(const CrossEntropyProblem<T>& p, int thread, int threads, const Body& body) {
  const int64_t width = strip_width<T>(p.classes), strips = (p.positions + width - 1) / width;
  const Range share = split(p.batch * strips, 1, thread, threads);
  for (int64_t i = share.begin; i < share.end; ++i) {
    const int64_t batch = i / strips, begin = i % strips * width;
    const int64_t size = p.positions - begin < width ? p.positions - begin : width;
    body(Strip{batch, begin, size, batch * p.positions + begin});
  }
}

template <class T>
const T* first_class(const ClassScores<const T>& scores, const Strip& strip) {
  return scores.data + strip.batch * scores.batch_stride + strip.begin;
}

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
  const T* probabilities;  // of the first of these positions, or null
  int64_t class_stride;
  int lanes;

  MNIST_EXT_INLINE V operator()(int64_t c) const {
    V x = V::broadcast(q.every);
    if (probabilities) x = fma(load(probabilities + c * class_stride, lanes), V::broadcast(q.target), x);
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
  const V sum = class_sum<T>(p.classes, [&](int64_t c) __attribute__((always_inline)) { return exp(logits(c) - max); });
  V log_sum{};
  for (int i = 0; i < lanes; ++i) log_sum.raw[i] = std::log(sum.raw[i]);
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
void forward_strip(const CrossEntropyForward<T>& x, const Coefficients<T>& q, const Strip& strip) {
  using A = ComputeType<T>;
  const CrossEntropyProblem<T>& p = x.problem;
  const int64_t width = strip_width<T>(p.classes);
  // A copy: read from memory once, though three times over, and not where power-of-two strides evict one another.
  A* tile = static_cast<A*>(scratch(Scratch::logits_tile, p.classes * width * sizeof(A)));
  const T* logits = first_class(p.logits, strip);
  for (int64_t c = 0; c < p.classes; ++c) {
    for_each_vector<T>(strip.size, [&](int64_t s, int lanes) __attribute__((always_inline)) {
      load(logits + c * p.logits.class_stride + s, lanes).store(tile + c * width + s);
    });
  }
  const T* probabilities = p.kind == TargetKind::probabilities ? first_class(p.probabilities, strip) : nullptr;
  for_each_vector<T>(strip.size, [&](int64_t s, int lanes) {
    const ColumnCoefficients<T> coefficients{q, probabilities ? probabilities + s : nullptr,
                                             p.probabilities.class_stride, lanes};
    forward_vector(x, coefficients, tile + s, width, strip.position + s);
  });
}

// What the gradient of a strip needs of each of its positions.
template <class T>
struct PositionFactors {
  using A = ComputeType<T>;
  static constexpr int64_t kSize = kStripVectors * Register<T>::width;

  alignas(64) A scale[kSize];   // the gradient of the position's loss
  alignas(64) A of_all[kSize];  // scale * the sum of q
  alignas(64) A counts[kSize];  // 1, or 0 where ignored
};

template <class T>
void backward_strip_of_indices(const CrossEntropyBackward<T>& x, const Coefficients<T>& q,
                               const GradientScale<T>& scales, const Strip& strip) {
  using A = ComputeType<T>;
  using V = Register<T>;
  const CrossEntropyProblem<T>& p = x.problem;
  const A* max = x.position_max + strip.position;
  const A* log_sum = x.position_log_sum + strip.position;
  PositionFactors<T> factors;
  alignas(64) A target_logits[PositionFactors<T>::kSize];
  const T* logits = first_class(p.logits, strip);
  T* grad = x.grad_logits + strip.batch * p.classes * p.positions + strip.begin;

  for (int64_t s = 0; s < strip.size; ++s) {
    const int64_t t = p.target[strip.position + s];
    const bool counts = t != p.ignore_index;
    const A scale = counts ? scales[strip.position + s] : A(0);
    const A of_target = counts ? scale * q.target * q.weight_of(t) : A(0);
    factors.counts[s] = counts ? A(1) : A(0);
    factors.scale[s] = scale;
    factors.of_all[s] = q.smoothed ? of_target + scale * q.every_summed : of_target;
    target_logits[s] = counts ? load_one(logits + t * p.logits.class_stride + s) : A(0);
  }
  for (int64_t c = 0; c < p.classes; ++c) {
    const V every = V::broadcast(q.every * q.weight_of(c));
    for_each_vector<T>(strip.size, [&](int64_t s, int lanes) __attribute__((always_inline)) {
      const V logit = load(logits + c * p.logits.class_stride + s, lanes);
      V g = load(factors.of_all + s, lanes) * exp((logit - load(max + s, lanes)) - load(log_sum + s, lanes));
      if (q.smoothed) g = g - load(factors.scale + s, lanes) * every;
      store(grad + c * p.positions + s, where_positive(load(factors.counts + s, lanes), g), lanes);
    });
  }
  // The targets' own entries again: without smoothing from p - 1, so that they are not lost to rounding as p
  // approaches 1.
  for_each_vector<T>(strip.size, [&](int64_t s, int lanes) {
    const V p_target = exp((load(target_logits + s, lanes) - load(max + s, lanes)) - load(log_sum + s, lanes));
    for (int i = 0; i < lanes; ++i) {
      const int64_t t = p.target[strip.position + s + i];
      if (t == p.ignore_index) continue;
      const A of_all = factors.of_all[s + i], of_target = factors.scale[s + i] * q.target * q.weight_of(t);
      const A g = q.smoothed ? of_all * p_target.raw[i] - factors.scale[s + i] * q.every * q.weight_of(t) - of_target
                             : of_target * (p_target.raw[i] - A(1));
      store_one(grad + t * p.positions + s + i, g);
    }
  });
}

template <class T>
void backward_strip_of_probabilities(const CrossEntropyBackward<T>& x, const Coefficients<T>& q,
                                     const GradientScale<T>& scales, const Strip& strip) {
  using V = Register<T>;
  const CrossEntropyProblem<T>& p = x.problem;
  const T* logits = first_class(p.logits, strip);
  const T* probabilities = first_class(p.probabilities, strip);
  const int64_t grad_offset = strip.batch * p.classes * p.positions + strip.begin;
  for_each_vector<T>(strip.size, [&](int64_t s, int lanes) {
    const ColumnCoefficients<T> coefficients{q, probabilities + s, p.probabilities.class_stride, lanes};
    V scale{};
    for (int i = 0; i < lanes; ++i) scale.raw[i] = scales[strip.position + s + i];
    const V max = load(x.position_max + strip.position + s, lanes);
    const V log_sum = load(x.position_log_sum + strip.position + s, lanes);
    const V of_all = scale * class_sum<T>(p.classes, coefficients);
    const V of_log_p = V{} - scale * V::broadcast(q.target);
    for (int64_t c = 0; c < p.classes; ++c) {
      const V log_p = (load(logits + c * p.logits.class_stride + s, lanes) - max) - log_sum;
      const int64_t at = grad_offset + c * p.positions + s;
      if (x.grad_logits) store(x.grad_logits + at, of_all * exp(log_p) - scale * coefficients(c), lanes);
      if (x.grad_probabilities) {
        store(x.grad_probabilities + at, of_log_p * (log_p * V::broadcast(q.weight_of(c))), lanes);
      }
    }
  });
}

}  // namespace mnist_ext::MNIST_EXT_ISA
