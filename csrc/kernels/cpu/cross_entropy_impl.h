// Softmax cross-entropy: one pass over the logits forward, one more for the gradient.
#pragma once

#include "cross_entropy_columns.h"
#include "cross_entropy_rows.h"

namespace mnist_ext::MNIST_EXT_ISA {

template <class T>
int64_t cross_entropy_forward(const CrossEntropyForward<T>& x, int threads) {
  const CrossEntropyProblem<T>& p = x.problem;
  const Targets targets = check_targets(p);
  if (targets.first_bad >= 0) return targets.first_bad;
  const Coefficients<T> q(p);
  parallel(threads_for(logits_of(p), kCrossEntropyGrain, threads), [&](int thread, int count) {
    if (p.positions == 1) {
      forward_rows(x, q, split(p.batch, 1, thread, count));
    } else {
      for_each_strip(p, thread, count, [&](const Strip& strip) { forward_strip(x, q, strip); });
    }
  });
  reduce_losses(x, targets.total_weight);
  return -1;
}

template <class T>
int64_t cross_entropy_backward(const CrossEntropyBackward<T>& x, int threads) {
  const CrossEntropyProblem<T>& p = x.problem;
  const Targets targets = check_targets(p);
  if (targets.first_bad >= 0) return targets.first_bad;
  if (!x.grad_logits && !x.grad_probabilities) return -1;
  const Coefficients<T> q(p);
  const GradientScale<T> scales(x);
  parallel(threads_for(logits_of(p), kCrossEntropyGrain, threads), [&](int thread, int count) {
    if (p.positions == 1) {
      const Range rows = split(p.batch, 1, thread, count);
      p.kind == TargetKind::indices ? backward_rows_of_indices(x, q, scales, rows)
                                    : backward_rows_of_probabilities(x, q, scales, rows);
    } else {
      for_each_strip(p, thread, count, [&](const Strip& strip) {
        p.kind == TargetKind::indices ? backward_strip_of_indices(x, q, scales, strip)
                                      : backward_strip_of_probabilities(x, q, scales, strip);
      });
    }
  });
  return -1;
}

}  // namespace mnist_ext::MNIST_EXT_ISA
