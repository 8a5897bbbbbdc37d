// Softmax cross-entropy: one pass over the logits forward, one more for the gradient; or both at once, while a row is
// still in the cache.
#pragma once

#include "../../api/backend.h"
#include "class_blocks.h"
#include "columns.h"

namespace mnist_ext::MNIST_EXT_ISA {

// Matrices of logits are divided among threads in pieces of so many rows.
template <class T>
int64_t rows_together(const CrossEntropyProblem<T>& p) {
  const bool together = p.classes <= kShortRow<T> && p.batch >= kShortRowsFrom;
  return together ? Register<T>::width : 1;
}

// A thread's share: forward, backward, or one after the other for each part of it.
template <class T>
void cross_entropy_share(const CrossEntropyWork<T>& work, int thread, int count) {
  const CrossEntropyProblem<T>& p = work.problem;
  if (p.positions != 1) {
    do_columns(work, thread, count);
  } else if (rows_together(p) > 1) {
    do_short_rows(work, thread, count);
  } else {
    const Range rows = split(p.batch, 1, thread, count);
    for (int64_t row = rows.begin; row < rows.end; ++row) do_row(work, row);
  }
}

template <class T>
int cross_entropy_threads(const CrossEntropyProblem<T>& p, const Launch& launch) {
  const double logits =
      static_cast<double>(p.batch) * static_cast<double>(p.classes) * static_cast<double>(p.positions);
  return threads_for(logits, kCrossEntropyGrain, launch.threads);
}

// A forward, with the gradient where that is wanted, by threads that each call share().
template <class T>
class ForwardPass {
 public:
  using A = ComputeType<T>;

  ForwardPass(const CrossEntropyForward<T>& args, void* workspace, double total_weight)
      : args_(args),
        results_(results(args, static_cast<A*>(workspace))),
        total_weight_(total_weight),
        divisor_(static_cast<A>(total_weight)),
        backward_{.problem = args.problem,
                  .grad_output = args.grad_output,
                  .grad_output_stride = args.grad_output_stride,
                  .position_max = results_.max,
                  .position_log_sum = results_.log_sum,
                  .total_weight = &divisor_,
                  .grad_logits = args.grad_logits,
                  .grad_probabilities = nullptr},
        q_(args.problem),
        scales_(args.grad_logits ? &backward_ : nullptr) {}
  ForwardPass(const ForwardPass&) = delete;
  ForwardPass& operator=(const ForwardPass&) = delete;

  void share(int thread, int count) const {
    const CrossEntropyWork<T> work = {args_.problem, q_, &results_, args_.grad_logits ? &backward_ : nullptr, scales_};
    if constexpr (!is_half<T>) {
      if (args_.block.size > 0) {
        const Range rows = split(args_.problem.batch, 1, thread, count);
        for (int64_t row = rows.begin; row < rows.end; ++row) do_block_of_row(work, args_.block, row);
        return;
      }
    }
    cross_entropy_share(work, thread, count);
  }

  // When all have done their share.
  void reduce() const {
    if (args_.total_weight) *args_.total_weight = divisor_;
    if (args_.loss) reduce_losses(args_, results_.loss, total_weight_);
  }

  static int64_t workspace_bytes(const CrossEntropyForward<T>& args) {
    return 3 * args.problem.batch * args.problem.positions * static_cast<int64_t>(sizeof(A));
  }

 private:
  static PositionResults<T> results(const CrossEntropyForward<T>& args, A* workspace) {
    const int64_t n = args.problem.batch * args.problem.positions;
    PositionResults<T> results = {workspace, workspace + n, workspace + 2 * n};
    if constexpr (!is_half<T>) {
      if (args.problem.reduction == Reduction::none && args.loss) results.loss = args.loss;
    }
    if (args.position_max) results.max = args.position_max;
    if (args.position_log_sum) results.log_sum = args.position_log_sum;
    return results;
  }

  const CrossEntropyForward<T>& args_;
  const PositionResults<T> results_;
  const double total_weight_;
  const A divisor_;
  const CrossEntropyBackward<T> backward_;
  const Coefficients<T> q_;
  const GradientScale<T> scales_;
};

// As the kernel table has it.
template <class T>
int64_t weigh_targets(const CrossEntropyProblem<T>& problem, ComputeType<T>* total_weight, void*, const Launch&) {
  const Targets targets = check_targets(problem);
  *total_weight = static_cast<ComputeType<T>>(targets.total_weight);
  return targets.first_bad;
}

template <class T>
int64_t cross_entropy_forward(const CrossEntropyForward<T>& args, void* workspace, const Launch& launch) {
  const Targets targets = check_targets(args.problem);
  if (targets.first_bad >= 0) return targets.first_bad;
  if (args.unless_one && load_one(args.grad_output) == ComputeType<T>(1)) return -1;
  const ForwardPass<T> pass(args, workspace, targets.total_weight);
  parallel(cross_entropy_threads(args.problem, launch), [&](int thread, int count) { pass.share(thread, count); });
  pass.reduce();
  return -1;
}

template <class T>
int64_t cross_entropy_backward(const CrossEntropyBackward<T>& args, const Launch& launch) {
  const Targets targets = check_targets(args.problem);
  if (targets.first_bad >= 0) return targets.first_bad;
  if (!args.grad_logits && !args.grad_probabilities) return -1;
  const Coefficients<T> q(args.problem);
  const GradientScale<T> scales(&args);
  parallel(cross_entropy_threads(args.problem, launch), [&](int thread, int count) {
    cross_entropy_share<T>({args.problem, q, nullptr, &args, scales}, thread, count);
  });
  return -1;
}

}  // namespace mnist_ext::MNIST_EXT_ISA
