// cross_entropy and cross_entropy_backward on the CPU: checks, allocation, dispatch on the dtype.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../kernels/cross_entropy.h"
#include "tensors.h"

namespace mnist_ext::ops {
namespace {

constexpr const char* kCrossEntropy = "mnist_ext.cross_entropy";
constexpr const char* kBackward = "mnist_ext.cross_entropy_backward";

void check_operands(const char* op, const Tensor& logits, const Tensor& target, int64_t reduction) {
  check_floating(op, "logits", logits);
  check(logits.dim() == 2, op, ": logits: expected 2 dimensions [N, C], got shape ", Shape(logits));
  check(target.scalar_type() == ScalarType::Long, op, ": target: expected int64, got ", DtypeName(target));
  check(target.is_cpu(), op, ": target: expected a tensor on the CPU, as logits is, got one on another device");
  check<std::invalid_argument>(target.dim() >= 1 && target.size(0) == logits.size(0), op, ": target: expected shape [",
                               logits.size(0), "] for logits ", Shape(logits), ", got ", Shape(target));
  check(target.dim() == 1, op, ": target: expected 1 dimension, [", logits.size(0), "], got shape ", Shape(target));
  check<std::invalid_argument>(0 <= reduction && reduction <= 2, op,
                               ": reduction: expected 0 (none), 1 (mean) or 2 (sum), got ", reduction);
}

void check_target_row(const char* op, int64_t bad_row, const Tensor& logits, const Tensor& target,
                      int64_t ignore_index) {
  if (bad_row < 0) return;
  const int64_t value = static_cast<const int64_t*>(target.const_data_ptr())[bad_row];
  fail<std::out_of_range>(op, ": target: expected class indices in [0, ", logits.size(1),
                          ") or ignore_index = ", ignore_index, ", got ", value, " at row ", bad_row);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& target, int64_t ignore_index,
                                                 int64_t reduction) {
  check_operands(kCrossEntropy, logits, target, reduction);
  const auto mode = static_cast<Reduction>(reduction);
  const int64_t rows = logits.size(0);
  const Tensor row_loss = empty(logits, {rows});
  const Tensor stats = empty(logits, {2, rows});
  const Tensor total_weight = empty(logits, {});
  const Tensor loss = mode == Reduction::none ? row_loss : empty(logits, {});

  const Matrix x = as_matrix(logits);
  const Tensor t = torch::stable::contiguous(target);
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    T* row_stats = static_cast<T*>(stats.mutable_data_ptr());
    const int64_t bad_row = cross_entropy_forward<T>({.rows = rows,
                                                      .classes = x.columns,
                                                      .logits = x.data<T>(),
                                                      .logits_stride = x.stride,
                                                      .target = static_cast<const int64_t*>(t.const_data_ptr()),
                                                      .ignore_index = ignore_index,
                                                      .reduction = mode,
                                                      .row_loss = static_cast<T*>(row_loss.mutable_data_ptr()),
                                                      .row_max = row_stats,
                                                      .row_log_sum = row_stats + rows,
                                                      .loss = static_cast<T*>(loss.mutable_data_ptr()),
                                                      .total_weight = static_cast<T*>(total_weight.mutable_data_ptr())},
                                                     threads());
    check_target_row(kCrossEntropy, bad_row, logits, t, ignore_index);
  });
  return {loss, stats, total_weight};
}

Tensor cross_entropy_backward(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                              const Tensor& stats, const Tensor& total_weight, int64_t ignore_index,
                              int64_t reduction) {
  check_operands(kBackward, logits, target, reduction);
  const auto mode = static_cast<Reduction>(reduction);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  check_like(kBackward, "grad_output", grad_output, "logits", logits);
  check_like(kBackward, "stats", stats, "logits", logits);
  check_like(kBackward, "total_weight", total_weight, "logits", logits);
  if (mode == Reduction::none) {
    check(grad_output.dim() == 1 && grad_output.size(0) == rows, kBackward, ": grad_output: expected shape [", rows,
          "] for reduction none, got ", Shape(grad_output));
  } else {
    check(grad_output.numel() == 1, kBackward, ": grad_output: expected one element, got shape ", Shape(grad_output));
  }
  check(stats.dim() == 2 && stats.size(0) == 2 && stats.size(1) == rows, kBackward, ": stats: expected shape [2, ",
        rows, "], got ", Shape(stats));
  check(total_weight.numel() == 1, kBackward, ": total_weight: expected one element, got shape ", Shape(total_weight));

  const Tensor grad_logits = empty(logits, {rows, classes});
  const Matrix x = as_matrix(logits);
  const Tensor t = torch::stable::contiguous(target), s = torch::stable::contiguous(stats);
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    const T* row_stats = static_cast<const T*>(s.const_data_ptr());
    const int64_t bad_row =
        mnist_ext::cross_entropy_backward<T>({.rows = rows,
                                              .classes = classes,
                                              .grad_output = static_cast<const T*>(grad_output.const_data_ptr()),
                                              .grad_output_stride = mode == Reduction::none ? grad_output.stride(0) : 0,
                                              .logits = x.data<T>(),
                                              .logits_stride = x.stride,
                                              .target = static_cast<const int64_t*>(t.const_data_ptr()),
                                              .ignore_index = ignore_index,
                                              .reduction = mode,
                                              .row_max = row_stats,
                                              .row_log_sum = row_stats + rows,
                                              .total_weight = static_cast<const T*>(total_weight.const_data_ptr()),
                                              .grad_logits = static_cast<T*>(grad_logits.mutable_data_ptr())},
                                             threads());
    check_target_row(kBackward, bad_row, logits, t, ignore_index);
  });
  return grad_logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ext, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}

}  // namespace mnist_ext::ops
