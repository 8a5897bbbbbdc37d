// cross_entropy and cross_entropy_backward on the CPU: checks, allocation, dispatch on the dtype.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <tuple>

#include "cross_entropy_operands.h"

namespace mnist_ext::ops {
namespace {

constexpr const char* kForward = "mnist_ext.cross_entropy";
constexpr const char* kWithGradient = "mnist_ext.cross_entropy_with_gradient";
constexpr const char* kBackward = "mnist_ext.cross_entropy_backward";

// What no caller gets: a tensor takes longer to make than a small batch to compute. Room for either ComputeType.
std::unique_ptr<double[]> numbers(int64_t n) { return std::make_unique_for_overwrite<double[]>(n); }

// Runs the forward kernel. statistics: max and log-sum-exp of each position, one after the other; position_loss,
// statistics, total_weight of ComputeType. grad_logits, loss: see CrossEntropyForward.
void forward(const char* op, const Tensor& logits, const Operands& operands, void* position_loss, void* statistics,
             void* total_weight, void* grad_logits, void* loss) {
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    using A = ComputeType<T>;
    A* position_max = static_cast<A*>(statistics);
    const int64_t bad_position =
        cross_entropy_forward<T>({.problem = operands.problem<T>(),
                                  .position_loss = static_cast<A*>(position_loss),
                                  .position_max = position_max,
                                  .position_log_sum = position_max + operands.layout.batch * operands.layout.positions,
                                  .total_weight = static_cast<A*>(total_weight),
                                  .grad_logits = static_cast<T*>(grad_logits),
                                  .loss = static_cast<T*>(loss)},
                                 threads());
    operands.check_class(op, bad_position);
  });
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& target,
                                                 const std::optional<Tensor>& weight, int64_t ignore_index,
                                                 double label_smoothing, int64_t reduction) {
  check_operands(kForward, logits, target, weight, ignore_index, label_smoothing, reduction);
  const Operands operands(logits, target, weight, ignore_index, label_smoothing, reduction);
  const Positions positions{logits};
  const int32_t dtype = dtype_of(logits), compute_dtype = compute_dtype_of(logits);
  int64_t stats_sizes[kMaxDims] = {2};
  for (int64_t i = 0; i < positions.dims(); ++i) stats_sizes[i + 1] = positions.size(i);
  const int64_t* sizes = stats_sizes + 1;
  const bool none = operands.reduction == Reduction::none;
  const bool loss_apart = !none || dtype != compute_dtype;
  const Tensor loss = empty(dtype, sizes, none ? positions.dims() : 0);
  const auto position_loss = numbers(loss_apart ? operands.layout.batch * operands.layout.positions : 0);
  const Tensor stats = empty(compute_dtype, stats_sizes, positions.dims() + 1);
  const Tensor total_weight = empty(compute_dtype, {});
  void* out = loss.mutable_data_ptr();
  forward(kForward, logits, operands, loss_apart ? position_loss.get() : out, stats.mutable_data_ptr(),
          total_weight.mutable_data_ptr(), nullptr, loss_apart ? out : nullptr);
  return {loss, stats, total_weight};
}

std::tuple<Tensor, Tensor> cross_entropy_with_gradient(const Tensor& logits, const Tensor& target,
                                                       const std::optional<Tensor>& weight, int64_t ignore_index,
                                                       double label_smoothing, int64_t reduction) {
  check_operands(kWithGradient, logits, target, weight, ignore_index, label_smoothing, reduction);
  check<std::invalid_argument>(reduction != 0, kWithGradient, ": reduction: expected 1 (mean) or 2 (sum), got 0");
  const Operands operands(logits, target, weight, ignore_index, label_smoothing, reduction);
  const Tensor loss = empty(dtype_of(logits), {}), grad_logits = operands.layout.gradient(logits);
  const int64_t positions = operands.layout.batch * operands.layout.positions;
  const auto position_loss = numbers(positions), statistics = numbers(2 * positions), total_weight = numbers(1);
  forward(kWithGradient, logits, operands, position_loss.get(), statistics.get(), total_weight.get(),
          grad_logits.mutable_data_ptr(), loss.mutable_data_ptr());
  return {loss, grad_logits};
}

std::tuple<Tensor, Tensor> cross_entropy_backward(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                                                  const std::optional<Tensor>& weight, const Tensor& stats,
                                                  const Tensor& total_weight, int64_t ignore_index,
                                                  double label_smoothing, int64_t reduction, bool need_logits,
                                                  bool need_target) {
  const BackwardOperands b(kBackward, grad_output, logits, target, weight, stats, total_weight, ignore_index,
                           label_smoothing, reduction, need_logits, need_target);
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    b.operands.check_class(kBackward, mnist_ext::cross_entropy_backward<T>(b.arguments<T>(), threads()));
  });
  return {b.grad_logits, b.grad_target};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ext, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_with_gradient", TORCH_BOX(&cross_entropy_with_gradient));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}

}  // namespace mnist_ext::ops
