// Softmax cross-entropy: one pass over the logits forward, one more for the gradient; or both at once, while a row is
// still in the cache.
#pragma once

#include "cross_entropy_columns.h"
#include "cross_entropy_rows.h"
#include "cross_entropy_short_rows.h"

namespace mnist_ext::MNIST_EXT_ISA {

// Matrices of logits are divided among threads in pieces of so many rows.
template <class T>
int64_t rows_together(const CrossEntropyProblem<T>& p) {
  const bool together = p.classes <= kShortRow<T> && p.batch >= kShortRowsFrom;
  return together ? Register<T>::width : 1;
}

// This thread's share: forward, backward, or one after the other for each part of it.
template <class T>
void cross_entropy_part(const StripWork<T>& work, int thread, int count) {
  const CrossEntropyProblem<T>& p = work.problem;
  if (p.positions != 1) {
    do_columns(work, thread, count);
  } else if (rows_together(p) > 1) {
    do_short_rows(work, thread, count);
  } else {
    const Range rows = split(p.batch, 1, thread, count);
    for (int64_t row = rows.begin; row < rows.end; ++row) do_row(work.forward, work.backward, work.q, work.scales, row);
  }
}

// Forward, backward, or both; either may be null.
template <class T>
void cross_entropy(const CrossEntropyProblem<T>& p, const CrossEntropyForward<T>* forward,
                   const CrossEntropyBackward<T>* backward, int threads) {
  const Coefficients<T> q(p);
  const GradientScale<T> scales(backward);
  const StripWork<T> work = {forward, backward, p, q, scales};
  const double logits =
      static_cast<double>(p.batch) * static_cast<double>(p.classes) * static_cast<double>(p.positions);
  parallel(threads_for(logits, kCrossEntropyGrain, threads),
           [&](int thread, int count) { cross_entropy_part(work, thread, count); });
}

template <class T>
int64_t cross_entropy_forward(const CrossEntropyForward<T>& x, int threads) {
  using A = ComputeType<T>;
  const CrossEntropyProblem<T>& p = x.problem;
  const Targets targets = check_targets(p);
  if (targets.first_bad >= 0) return targets.first_bad;
  *x.total_weight = static_cast<A>(targets.total_weight);
  T one;
  store_one(&one, A(1));
  const CrossEntropyBackward<T> backward = {.problem = p,
                                            .grad_output = &one,
                                            .grad_output_stride = 0,
                                            .position_max = x.position_max,
                                            .position_log_sum = x.position_log_sum,
                                            .total_weight = x.total_weight,
                                            .grad_logits = x.grad_logits,
                                            .grad_probabilities = nullptr};
  cross_entropy(p, &x, x.grad_logits ? &backward : nullptr, threads);
  reduce_losses(x, targets.total_weight);
  return -1;
}

template <class T>
int64_t cross_entropy_backward(const CrossEntropyBackward<T>& x, int threads) {
  const Targets targets = check_targets(x.problem);
  if (targets.first_bad >= 0) return targets.first_bad;
  if (x.grad_logits || x.grad_probabilities) cross_entropy<T>(x.problem, nullptr, &x, threads);
  return -1;
}

}  // namespace mnist_ext::MNIST_EXT_ISA
