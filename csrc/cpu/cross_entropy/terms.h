// What the layouts of softmax cross-entropy share: targets, coefficients, the reduction over positions, and formulas.
//
// A formula takes a vector at a time: some classes of one position (rows.h: struct Row), or one class of some positions
// (columns.h: struct Column). `along` says which:
//   at(scores, c)       where the vector lies that begins at class c
//   for_each(body)      body(c, lanes) for each vector; so many of its numbers exist
//   sum(f)              the sum of f(c, lanes) over all classes, in every lane
//   weights(w, c, n)    the weights of the vector's classes
//   statistics(x)       what the forward found, from x on, one number for each position
#pragma once

#include <cmath>
#include <limits>

#include "../../api/cross_entropy.h"
#include "../simd/elements.h"
#include "../simd/exp_log.h"
#include "../threads/parallel.h"

namespace mnist_ext::MNIST_EXT_ISA {

inline constexpr double kCrossEntropyGrain = 16384;  // logits that are worth a thread of their own

// Where the forward writes what it finds for each position: [batch, positions], 0 where ignored.
template <class T>
struct PositionResults {
  ComputeType<T>*loss, *max, *log_sum;
};

// The coefficients q of the contract, apart from the class weights' vectors.
template <class T>
struct Coefficients {
  using A = ComputeType<T>;

  const T* weight;
  bool smoothed;
  A target;        // 1 - s
  A every;         // s / classes
  A every_summed;  // sum_c s / classes * w_c

  explicit Coefficients(const CrossEntropyProblem<T>& p)
      : weight(p.weight),
        smoothed(p.label_smoothing > 0),
        target(static_cast<A>(1 - p.label_smoothing)),
        every(smoothed ? static_cast<A>(p.label_smoothing / static_cast<double>(p.classes)) : A(0)),
        every_summed(0) {
    if (!smoothed || p.kind == TargetKind::probabilities) return;
    double sum = static_cast<double>(p.classes);
    if (weight) {
      sum = 0;
      for (int64_t c = 0; c < p.classes; ++c) sum += static_cast<double>(load_one(weight + c));
    }
    every_summed = static_cast<A>(p.label_smoothing / static_cast<double>(p.classes) * sum);
  }

  A weight_of(int64_t c) const { return weight ? load_one(weight + c) : A(1); }
};

struct Targets {
  int64_t first_bad;    // the first position with a target that is neither ignored nor a class, or -1
  double total_weight;  // of the positions that are not ignored, if none is bad
};

// Without branches, so that it is done in vectors; only a bad target is looked for.
template <class T, class Index>
Targets check_targets(const CrossEntropyProblem<T>& p, const Index* target) {
  const int64_t n = p.batch * p.positions;
  const auto counts = [&](int64_t i) { return static_cast<int64_t>(target[i]) != p.ignore_index; };
  const auto is_class = [&](int64_t i) {
    return static_cast<uint64_t>(static_cast<int64_t>(target[i])) < static_cast<uint64_t>(p.classes);
  };
  int64_t counted = 0, bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    counted += counts(i);
    bad += int{counts(i)} & !is_class(i);
  }
  if (bad > 0) {
    int64_t first = 0;
    while (!counts(first) || is_class(first)) ++first;
    return {first, 0};
  }
  if (!p.weight) return {-1, static_cast<double>(counted)};
  double weights = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (counts(i)) weights += static_cast<double>(load_one(p.weight + target[i]));
  }
  return {-1, weights};
}

template <class T>
Targets check_targets(const CrossEntropyProblem<T>& p) {
  if (p.kind == TargetKind::probabilities) {
    const double n = static_cast<double>(p.batch * p.positions);
    return {-1, p.classes > 0 ? n : std::numeric_limits<double>::quiet_NaN()};
  }
  switch (p.target.type) {
    case ClassIndices::Type::int64: return check_targets(p, static_cast<const int64_t*>(p.target.data));
    case ClassIndices::Type::int32: return check_targets(p, static_cast<const int32_t*>(p.target.data));
    default: return check_targets(p, static_cast<const uint8_t*>(p.target.data));
  }
}

// Pairwise: the error grows with the logarithm of n.
template <class A>
double pairwise_sum(const A* x, int64_t n) {
  if (n <= 128) {
    double sums[8] = {};  // eight chains: an addition waits for the one before it
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      for (int k = 0; k < 8; ++k) sums[k] += x[i + k];
    }
    for (int k = 0; i < n; ++i, ++k) sums[k] += x[i];
    return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
  }
  const int64_t half = n / 2;
  return pairwise_sum(x, half) + pairwise_sum(x + half, n - half);
}

// From the positions' losses to what the caller asked for.
template <class T>
void reduce_losses(const CrossEntropyForward<T>& args, const ComputeType<T>* position_loss, double total_weight) {
  using A = ComputeType<T>;
  const int64_t n = args.problem.batch * args.problem.positions;
  if (args.problem.reduction != Reduction::none) {
    const double sum = pairwise_sum(position_loss, n);
    store_one(args.loss, static_cast<A>(args.problem.reduction == Reduction::mean ? sum / total_weight : sum));
  } else if constexpr (is_half<T>) {  // else the positions' losses are what the caller asked for
    for_each_vector<T>(n, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      store(args.loss + i, load(position_loss + i, lanes), lanes);
    });
  }
}

// What multiplies the gradient of each position's loss.
template <class T>
struct GradientScale {
  using A = ComputeType<T>;

  const T* each = nullptr;  // of the first position, for Reduction::none
  int64_t stride = 0;
  A of_all = 0;

  explicit GradientScale(const CrossEntropyBackward<T>* args) {
    if (!args) return;
    if (args->problem.reduction == Reduction::none) {
      each = args->grad_output;
      stride = args->grad_output_stride;
      return;
    }
    of_all = args->grad_output ? load_one(args->grad_output) : A(1);
    if (args->problem.reduction == Reduction::mean) of_all /= *args->total_weight;
  }

  A operator[](int64_t position) const { return each ? load_one(each + position * stride) : of_all; }

  Register<T> vector(int64_t position, int lanes) const {
    Register<T> scale = Register<T>::broadcast(of_all);
    for (int i = 0; each && i < lanes; ++i) scale.raw[i] = (*this)[position + i];
    return scale;
  }
};

// What to do with positions: forward if `forward` is given, then gradients if `backward` is.
template <class T>
struct CrossEntropyWork {
  const CrossEntropyProblem<T>& problem;
  const Coefficients<T>& q;
  const PositionResults<T>* forward;
  const CrossEntropyBackward<T>* backward;
  const GradientScale<T>& scales;
};

// Scores of a position, or of neighbouring ones: those of class c lie at data + c * class_stride; or data is null.
template <class S>
struct Scores {
  S* data;
  int64_t class_stride;

  Scores from(int64_t position) const { return {data ? data + position : nullptr, class_stride}; }

  // A whole one, where so many positions have memory.
  MNIST_EXT_INLINE auto vector(int64_t c) const { return Vec<std::remove_const_t<S>>::load(data + c * class_stride); }
};

// The parts of all tensors from a position on; those not given or not wanted are null. S: the tensors' type, or its
// ComputeType for scores that were widened and gradients that are to be narrowed.
template <class S>
struct PositionTensors {
  Scores<const S> logits, probabilities;
  Scores<S> grad_logits, grad_probabilities;

  PositionTensors from(int64_t position) const {
    return {logits.from(position), probabilities.from(position), grad_logits.from(position),
            grad_probabilities.from(position)};
  }
};

template <class T>
PositionTensors<T> tensors_at(const CrossEntropyWork<T>& work, int64_t batch, int64_t position) {
  const CrossEntropyProblem<T>& p = work.problem;
  const auto scores = [&](const ClassScores<const T>& s) -> Scores<const T> {
    return {s.data ? s.data + batch * s.batch_stride + position : nullptr, s.class_stride};
  };
  const auto gradient = [&](T* grad) -> Scores<T> {
    return {grad ? grad + batch * p.classes * p.positions + position : nullptr, p.positions};
  };
  const CrossEntropyBackward<T>* backward = work.backward;
  return {scores(p.logits), scores(p.probabilities), gradient(backward ? backward->grad_logits : nullptr),
          gradient(backward ? backward->grad_probabilities : nullptr)};
}

// q, without the term of the target class.
template <class T, class S, class Along>
struct VectorOfCoefficients {
  using V = Register<T>;

  const Coefficients<T>& q;
  Scores<const S> probabilities;  // or data null
  Along along;

  MNIST_EXT_INLINE V operator()(int64_t c, int lanes) const {
    V x = V::broadcast(q.every);
    if (probabilities.data) x = fma(load(along.at(probabilities, c), lanes), V::broadcast(q.target), x);
    return q.weight ? x * along.weights(q.weight, c, lanes) : x;
  }
};

// The softmax, from the logits and what the forward found.
template <class T, class S, class Along>
struct RecomputedSoftmax {
  using V = Register<T>;

  Scores<const S> logits;
  Along along;
  V max, log_sum;

  RecomputedSoftmax(const CrossEntropyBackward<T>& args, Scores<const S> scores, Along direction, int64_t position)
      : logits(scores),
        along(direction),
        max(along.statistics(args.position_max + position)),
        log_sum(along.statistics(args.position_log_sum + position)) {}

  MNIST_EXT_INLINE V operator()(int64_t c, int lanes) const {
    constexpr auto lowest = -std::numeric_limits<ComputeType<T>>::infinity();
    return exp((load(along.at(logits, c), lanes, lowest) - max) - log_sum);
  }
  MNIST_EXT_INLINE auto times(V factor) const {
    return [factor, softmax = *this](int64_t c, int lanes)
               __attribute__((always_inline)) { return factor * softmax(c, lanes); };
  }
  ComputeType<T> of_class(int64_t c) const {
    return exp((V::broadcast(load_one(along.at(logits, c))) - max) - log_sum).raw[0];
  }
};

// The softmax from exponentials that the forward kept: one exp per logit for both.
template <class T, class Along>
struct KeptSoftmax {
  using V = Register<T>;

  Scores<const ComputeType<T>> exponentials;
  Along along;
  V inverse_sum;

  MNIST_EXT_INLINE V operator()(int64_t c, int lanes) const {
    return load(along.at(exponentials, c), lanes) * inverse_sum;
  }
  MNIST_EXT_INLINE KeptSoftmax times(V factor) const { return {exponentials, along, factor * inverse_sum}; }
  ComputeType<T> of_class(int64_t c) const { return *along.at(exponentials, c) * inverse_sum.raw[0]; }
};

// The gradients where the targets are probabilities. minus_scale: -scale * (1 - s).
template <class T, class S, class Along, class Softmax>
MNIST_EXT_INLINE void backward_of_probabilities(const CrossEntropyWork<T>& work, const PositionTensors<S>& at,
                                                const Along& along, const Softmax& softmax, int64_t position,
                                                Register<T> scale, Register<T> minus_scale) {
  using V = Register<T>;
  const T* const weight = work.q.weight;
  const VectorOfCoefficients<T, S, Along> coefficients{work.q, at.probabilities, along};
  if (at.grad_logits.data) {
    const auto scaled_softmax = softmax.times(scale * along.sum(coefficients));
    along.for_each([&](int64_t c, int lanes) __attribute__((always_inline)) {
      const V g = scaled_softmax(c, lanes) - uncontracted(scale * coefficients(c, lanes));
      store(along.at(at.grad_logits, c), g, lanes);
    });
  }
  if (at.grad_probabilities.data) {
    const V max = along.statistics(work.backward->position_max + position);
    const V log_sum = along.statistics(work.backward->position_log_sum + position);
    along.for_each([&](int64_t c, int lanes) __attribute__((always_inline)) {
      const V log_p = (load(along.at(at.logits, c), lanes) - max) - log_sum;
      const V g = minus_scale * (weight ? log_p * along.weights(weight, c, lanes) : log_p);
      store(along.at(at.grad_probabilities, c), g, lanes);
    });
  }
}

}  // namespace mnist_ext::MNIST_EXT_ISA
