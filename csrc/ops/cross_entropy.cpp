// The cross_entropy ops: checks, allocation, dispatch on the dtype.
#include <tuple>

#include "cross_entropy_operands.h"
#include "device.h"
#include "schemas.h"

namespace mnist_ext::ops {
namespace {

constexpr const char* kForward = "mnist_ext.cross_entropy";
constexpr const char* kWithGradient = "mnist_ext.cross_entropy_with_gradient";
constexpr const char* kGradient = "mnist_ext.cross_entropy_gradient_";
constexpr const char* kBackward = "mnist_ext.cross_entropy_backward";

// What the forward kernel writes; null: not wanted.
struct Outputs {
  const Tensor* loss = nullptr;
  const Tensor* stats = nullptr;  // max and log-sum-exp of each position, one after the other
  const Tensor* total_weight = nullptr;
  const Tensor* grad_logits = nullptr;
};

// grad_output: null, or what a gradient that was formed without is made that of.
void forward(const char* op, const Tensor& logits, const Operands& operands, const Outputs& outputs,
             const Tensor* grad_output = nullptr) {
  OnDevice device(logits);
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    using A = ComputeType<T>;
    const auto data = [](const Tensor* t) { return t ? t->mutable_data_ptr() : nullptr; };
    A* position_max = static_cast<A*>(data(outputs.stats));
    const int64_t positions = operands.layout.batch * operands.layout.positions;
    const CrossEntropyForward<T> args = {
        .problem = operands.problem<T>(),
        .position_max = position_max,
        .position_log_sum = position_max ? position_max + positions : nullptr,
        .total_weight = static_cast<A*>(data(outputs.total_weight)),
        .loss = static_cast<T*>(data(outputs.loss)),
        .grad_logits = static_cast<T*>(data(outputs.grad_logits)),
        .grad_output = grad_output ? static_cast<const T*>(grad_output->const_data_ptr()) : nullptr,
        .unless_one = grad_output != nullptr};
    void* workspace = device.workspace(kernels<T>().cross_entropy_workspace_bytes(args));
    operands.check_class(op, kernels<T>().cross_entropy_forward(args, workspace, device.launch()));
  });
}

void check_reduced(const char* op, int64_t reduction) {
  check<std::invalid_argument>(reduction != 0, op, ": reduction: expected 1 (mean) or 2 (sum), got 0");
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& target,
                                                 const std::optional<Tensor>& weight, int64_t ignore_index,
                                                 double label_smoothing, int64_t reduction) {
  check_operands(kForward, logits, target, weight, ignore_index, label_smoothing, reduction);
  const Operands operands(logits, target, weight, ignore_index, label_smoothing, reduction);
  const Positions positions{logits};
  int64_t stats_sizes[kMaxDims] = {2};
  for (int64_t i = 0; i < positions.dims(); ++i) stats_sizes[i + 1] = positions.size(i);
  const Device device = device_of(logits);
  const bool none = operands.reduction == Reduction::none;
  const Tensor loss = empty(device, dtype_of(logits), stats_sizes + 1, none ? positions.dims() : 0);
  const Tensor stats = empty(device, compute_dtype_of(logits), stats_sizes, positions.dims() + 1);
  const Tensor total_weight = empty(device, compute_dtype_of(logits), {});
  forward(kForward, logits, operands, {.loss = &loss, .stats = &stats, .total_weight = &total_weight});
  return {loss, stats, total_weight};
}

std::tuple<Tensor, Tensor> cross_entropy_with_gradient(const Tensor& logits, const Tensor& target,
                                                       const std::optional<Tensor>& weight, int64_t ignore_index,
                                                       double label_smoothing, int64_t reduction) {
  check_operands(kWithGradient, logits, target, weight, ignore_index, label_smoothing, reduction);
  check_reduced(kWithGradient, reduction);
  const Operands operands(logits, target, weight, ignore_index, label_smoothing, reduction);
  const Tensor loss = empty(device_of(logits), dtype_of(logits), {});
  const Tensor grad_logits = operands.layout.gradient(logits);
  forward(kWithGradient, logits, operands, {.loss = &loss, .grad_logits = &grad_logits});
  return {loss, grad_logits};
}

void cross_entropy_gradient_(const Tensor& gradient, const Tensor& grad_output, const Tensor& logits,
                             const Tensor& target, const std::optional<Tensor>& weight, int64_t ignore_index,
                             double label_smoothing, int64_t reduction) {
  check_operands(kGradient, logits, target, weight, ignore_index, label_smoothing, reduction);
  check_reduced(kGradient, reduction);
  const Operands operands(logits, target, weight, ignore_index, label_smoothing, reduction);
  check_grad_output(kGradient, grad_output, logits, operands.reduction);
  check_like(kGradient, "gradient", gradient, "logits", logits);
  check(operands.layout.is_gradient(gradient, logits), kGradient,
        ": gradient: expected what cross_entropy_with_gradient returned for logits ", Shape(logits), ", got ",
        Shape(gradient));
  forward(kGradient, logits, operands, {.grad_logits = &gradient}, &grad_output);
}

std::tuple<Tensor, Tensor> cross_entropy_backward(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                                                  const std::optional<Tensor>& weight, const Tensor& stats,
                                                  const Tensor& total_weight, int64_t ignore_index,
                                                  double label_smoothing, int64_t reduction, bool need_logits,
                                                  bool need_target) {
  const BackwardOperands b(kBackward, grad_output, logits, target, weight, stats, total_weight, ignore_index,
                           label_smoothing, reduction, need_logits, need_target);
  OnDevice device(logits);
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    const CrossEntropyBackward<T> args = b.arguments<T>();
    b.operands.check_class(kBackward, kernels<T>().cross_entropy_backward(args, device.launch()));
  });
  return {b.grad_logits, b.grad_target};
}

}  // namespace

void implement_cross_entropy(Library& m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_with_gradient", TORCH_BOX(&cross_entropy_with_gradient));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&cross_entropy_gradient_));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}

}  // namespace mnist_ext::ops
