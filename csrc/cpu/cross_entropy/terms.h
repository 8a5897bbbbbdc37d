// What the two layouts of softmax cross-entropy share: targets, coefficients, the reduction over positions.
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
    bad += counts(i) & !is_class(i);
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
    switch (args->problem.reduction) {
      case Reduction::none:
        each = args->grad_output;
        stride = args->grad_output_stride;
        break;
      case Reduction::mean: of_all = load_one(args->grad_output) / *args->total_weight; break;
      case Reduction::sum: of_all = load_one(args->grad_output); break;
    }
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

}  // namespace mnist_ext::MNIST_EXT_ISA
