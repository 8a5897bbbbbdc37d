// The cross_entropy ops on CUDA: checks, allocation, dispatch on the dtype. Nothing here waits for the device.
#include "../../kernels/cuda/cross_entropy.h"

#include "../cross_entropy_operands.h"
#include "device.h"
#include "ops.h"

namespace mnist_ext::ops::cuda {
namespace {

constexpr const char* kForward = "mnist_ext.cross_entropy";
constexpr const char* kWithGradient = "mnist_ext.cross_entropy_with_gradient";
constexpr const char* kGradient = "mnist_ext.cross_entropy_gradient_";
constexpr const char* kBackward = "mnist_ext.cross_entropy_backward";

template <class T>
T* data_of(const Tensor& t) {  // null for an undefined tensor: not wanted
  return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

// Runs the forward kernel; undefined outputs are not wanted. stats: max and log-sum-exp, one after the other.
void forward(const Operands& operands, const Tensor& logits, const Tensor& position_loss, const Tensor& stats,
             const Tensor& total_weight, const Tensor& grad_logits, const Tensor& loss, const Tensor* grad_output,
             bool unless_one) {
  const Layout& layout = operands.layout;
  const OnDeviceOf device(logits);
  const int64_t bytes = mnist_ext::cuda::cross_entropy_workspace_bytes(layout.batch, layout.classes, layout.positions);
  Tensor workspace;
  if (bytes > 0) workspace = empty(device_of(logits), aoti_torch_dtype_uint8(), {bytes});
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    using A = ComputeType<T>;
    A* position_max = data_of<A>(stats);
    mnist_ext::cuda::cross_entropy_forward<T>(
        {.problem = operands.problem<T>(),
         .position_loss = data_of<A>(position_loss),
         .position_max = position_max,
         .position_log_sum = position_max ? position_max + layout.batch * layout.positions : nullptr,
         .total_weight = data_of<A>(total_weight),
         .grad_logits = data_of<T>(grad_logits),
         .loss = data_of<T>(loss)},
        grad_output ? static_cast<const T*>(grad_output->const_data_ptr()) : nullptr, unless_one, nullptr,
        data_of<void>(workspace), device.stream());
  });
}

void check_reduced(const char* op, int64_t reduction) {
  check<std::invalid_argument>(reduction != 0, op, ": reduction: expected 1 (mean) or 2 (sum), got 0");
}

}  // namespace

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
  forward(operands, logits, Tensor(), stats, total_weight, Tensor(), loss, nullptr, false);
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
  forward(operands, logits, Tensor(), Tensor(), Tensor(), grad_logits, loss, nullptr, false);
  return {loss, grad_logits};
}

void cross_entropy_gradient_(Tensor gradient, const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                             const std::optional<Tensor>& weight, int64_t ignore_index, double label_smoothing,
                             int64_t reduction) {
  check_operands(kGradient, logits, target, weight, ignore_index, label_smoothing, reduction);
  check_reduced(kGradient, reduction);
  const Operands operands(logits, target, weight, ignore_index, label_smoothing, reduction);
  check_grad_output(kGradient, grad_output, logits, operands.reduction);
  check_like(kGradient, "gradient", gradient, "logits", logits);
  check(operands.layout.is_gradient(gradient, logits), kGradient,
        ": gradient: expected what cross_entropy_with_gradient returned for logits ", Shape(logits), ", got ",
        Shape(gradient));
  forward(operands, logits, Tensor(), Tensor(), Tensor(), gradient, Tensor(), &grad_output, true);
}

std::tuple<Tensor, Tensor> cross_entropy_backward(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                                                  const std::optional<Tensor>& weight, const Tensor& stats,
                                                  const Tensor& total_weight, int64_t ignore_index,
                                                  double label_smoothing, int64_t reduction, bool need_logits,
                                                  bool need_target) {
  const BackwardOperands b(kBackward, grad_output, logits, target, weight, stats, total_weight, ignore_index,
                           label_smoothing, reduction, need_logits, need_target);
  if (!need_logits && !need_target) return {b.grad_logits, b.grad_target};
  const OnDeviceOf device(logits);
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    mnist_ext::cuda::cross_entropy_backward<T>(b.arguments<T>(), device.stream());
  });
  return {b.grad_logits, b.grad_target};
}

}  // namespace mnist_ext::ops::cuda
