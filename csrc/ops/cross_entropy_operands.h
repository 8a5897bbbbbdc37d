// The arguments of the cross_entropy ops, checked and in the kernels' terms.
#pragma once

#include <optional>
#include <string>

#include "tensors.h"

namespace mnist_ext::ops {

// The shape of logits without the dimension of the classes, which is the second one, or the only one.
struct Positions {
  const Tensor& logits;

  int64_t dims() const { return logits.dim() - 1; }
  int64_t size(int64_t i) const { return logits.size(i == 0 ? 0 : i + 1); }
  bool is_shape_of(const Tensor& t) const {
    bool same = t.dim() == dims();
    for (int64_t i = 0; same && i < dims(); ++i) same = t.size(i) == size(i);
    return same;
  }
  friend std::ostream& operator<<(std::ostream& out, const Positions& p) {
    out << '[';
    for (int64_t i = 0; i < p.dims(); ++i) out << (i ? ", " : "") << p.size(i);
    return out << ']';
  }
};

inline int64_t class_dim(const Tensor& logits) { return logits.dim() == 1 ? 0 : 1; }

inline void check_probabilities(const char* op, const Tensor& logits, const Tensor& target, int64_t ignore_index) {
  check_like(op, "target", target, "logits", logits);
  bool same = target.dim() == logits.dim();
  for (int64_t i = 0; same && i < logits.dim(); ++i) same = target.size(i) == logits.size(i);
  check(same, op, ": target: expected probabilities of the shape of logits, ", Shape(logits), ", got ", Shape(target));
  check(ignore_index < 0, op, ": ignore_index: expected a negative number, as target holds probabilities, got ",
        ignore_index);
}

inline void check_indices(const char* op, const Tensor& logits, const Tensor& target) {
  check(has_class_indices(target), op,
        ": target: expected class indices of dtype int64, int32 or uint8, or probabilities of the shape and dtype of "
        "logits, ",
        Shape(logits), " ", DtypeName(logits), ", got ", Shape(target), " ", DtypeName(target));
  check_device(op, "target", target, "logits", logits);
  const Positions positions{logits};
  if (positions.is_shape_of(target)) return;
  // A batch size of its own is a ValueError in PyTorch, another shape a RuntimeError.
  if (logits.dim() > 1) {
    const int64_t batch = target.dim() > 0 ? target.size(0) : 0;
    check<std::invalid_argument>(target.dim() > 0 && batch == logits.size(0), op, ": target: expected shape ",
                                 positions, " for logits ", Shape(logits), ", got ", Shape(target));
  }
  fail<std::runtime_error>(op, ": target: expected shape ", positions, " for logits ", Shape(logits), ", got ",
                           Shape(target));
}

inline void check_operands(const char* op, const Tensor& logits, const Tensor& target,
                           const std::optional<Tensor>& weight, int64_t ignore_index, double label_smoothing,
                           int64_t reduction) {
  check_floating(op, "logits", logits);
  check(1 <= logits.dim() && logits.dim() <= kMaxDims, op, ": logits: expected [C], [N, C] or [N, C, d1, ...], got ",
        Shape(logits));
  if (is_floating(target)) {
    check_probabilities(op, logits, target, ignore_index);
  } else {
    check_indices(op, logits, target);
  }
  if (weight) {
    check_like(op, "weight", *weight, "logits", logits);
    const int64_t classes = logits.size(class_dim(logits));
    check(weight->dim() == 1 && weight->size(0) == classes, op, ": weight: expected shape [", classes,
          "], one for each class, got ", Shape(*weight));
  }
  check(0 <= label_smoothing && label_smoothing <= 1, op, ": label_smoothing: expected a number in [0, 1], got ",
        label_smoothing);
  check<std::invalid_argument>(0 <= reduction && reduction <= 2, op,
                               ": reduction: expected 0 (none), 1 (mean) or 2 (sum), got ", reduction);
}

inline void check_grad_output(const char* op, const Tensor& grad_output, const Tensor& logits, Reduction reduction) {
  const Positions positions{logits};
  check_like(op, "grad_output", grad_output, "logits", logits);
  if (reduction == Reduction::none) {
    check(positions.is_shape_of(grad_output), op, ": grad_output: expected shape ", positions,
          " for reduction none, got ", Shape(grad_output));
  } else {
    check(grad_output.numel() == 1, op, ": grad_output: expected one element, got shape ", Shape(grad_output));
  }
}

// What the backward gets from the forward.
inline void check_statistics(const char* op, const Tensor& logits, const Tensor& stats, const Tensor& total_weight) {
  const Positions positions{logits};
  bool fitting = stats.dim() == positions.dims() + 1 && stats.size(0) == 2;
  for (int64_t i = 0; fitting && i < positions.dims(); ++i) fitting = stats.size(i + 1) == positions.size(i);
  check(fitting, op, ": stats: expected shape [2, ...] with ", positions, " for ..., got ", Shape(stats));
  check(total_weight.numel() == 1, op, ": total_weight: expected one element, got shape ", Shape(total_weight));
  for (const Tensor* t : {&stats, &total_weight}) {
    const char* argument = t == &stats ? "stats" : "total_weight";
    check(dtype_of(*t) == compute_dtype_of(logits), op, ": ", argument,
          ": expected float64 for logits of float64, else float32, got ", DtypeName(*t));
    check_device(op, argument, *t, "logits", logits);
  }
}

// Where logits, probabilities and their gradients lie, in the kernels' terms.
struct Layout {
  int64_t batch = 1, classes, positions = 1;
  bool classes_last;  // logits [N, C, d1, ...] that lie in memory as [N, d1, ..., C]: a matrix

  Layout(const Tensor& logits, const Tensor& target) : classes(logits.size(class_dim(logits))) {
    const int64_t dims = logits.dim();
    if (dims > 1) batch = logits.size(0);
    for (int64_t i = 2; i < dims; ++i) positions *= logits.size(i);
    classes_last = dims > 2 && !is_floating(target) && lies_with_classes_last(logits);
    if (classes_last) {
      batch *= positions;
      positions = 1;
    }
  }

  static bool lies_with_classes_last(const Tensor& t) {  // mnist_ext/_fake.py has the same rule
    if (t.numel() == 0) return true;
    int64_t expected = 1;
    const auto fits = [&](int64_t dim) {
      const bool fitting = t.size(dim) == 1 || t.stride(dim) == expected;
      expected *= t.size(dim);
      return fitting;
    };
    bool fitting = fits(1);
    for (int64_t dim = t.dim() - 1; dim >= 2; --dim) fitting = fitting && fits(dim);
    return fitting && fits(0);
  }

  // An uninitialized tensor of the shape of `logits`, laid out as the kernels write gradients.
  Tensor gradient(const Tensor& logits) const {
    const int64_t dims = logits.dim();
    int64_t sizes[kMaxDims], strides[kMaxDims];
    for (int64_t i = 0; i < dims; ++i) sizes[i] = logits.size(i);
    if (!classes_last) return empty(device_of(logits), dtype_of(logits), sizes, dims);
    int64_t stride = 1;
    const auto next = [&](int64_t dim) {
      strides[dim] = stride;
      stride *= sizes[dim] > 1 ? sizes[dim] : 1;
    };
    next(1);
    for (int64_t dim = dims - 1; dim >= 2; --dim) next(dim);
    next(0);
    return empty_strided(device_of(logits), dtype_of(logits), sizes, strides, dims);
  }

  // Whether t could have been made by gradient().
  bool is_gradient(const Tensor& t, const Tensor& logits) const {
    if (t.dim() != logits.dim()) return false;
    for (int64_t i = 0; i < t.dim(); ++i) {
      if (t.size(i) != logits.size(i)) return false;
    }
    return classes_last ? lies_with_classes_last(t) : t.is_contiguous();
  }
};

// Logits or probabilities as the kernels want them.
struct Scores {
  Tensor tensor;  // the tensor itself, or a contiguous copy where its strides cannot be expressed
  int64_t batch_stride, class_stride;

  Scores(const Tensor& t, const Layout& layout) : tensor(t), batch_stride(layout.classes), class_stride(1) {
    const int64_t dims = t.dim();
    if (layout.classes_last) return;
    if (dims <= 2) {
      if (layout.classes > 1 && t.stride(dims - 1) != 1) tensor = torch::stable::contiguous(t);
      if (dims == 2) batch_stride = tensor.stride(0);
    } else {
      if (layout.positions == 1 || merged_stride(t, 2, dims) != 1) tensor = torch::stable::contiguous(t);
      batch_stride = tensor.stride(0);
      class_stride = tensor.stride(1);
    }
  }

  template <class T>
  ClassScores<const T> as() const {
    return {static_cast<const T*>(tensor.const_data_ptr()), batch_stride, class_stride};
  }
};

// The arguments of both ops in the kernels' terms.
struct Operands {
  Layout layout;
  Scores logits;
  std::optional<Scores> probabilities;
  std::optional<Tensor> indices, weight;
  int64_t ignore_index;
  double label_smoothing;
  Reduction reduction;

  Operands(const Tensor& x, const Tensor& target, const std::optional<Tensor>& w, int64_t ignored, double smoothing,
           int64_t mode)
      : layout(x, target),
        logits(x, layout),
        ignore_index(ignored),
        label_smoothing(smoothing),
        reduction(static_cast<Reduction>(mode)) {
    if (is_floating(target)) {
      probabilities.emplace(target, layout);
    } else {
      indices = made_contiguous(target);
    }
    if (w) weight = made_contiguous(*w);
  }

  template <class T>
  CrossEntropyProblem<T> problem() const {
    return {.batch = layout.batch,
            .classes = layout.classes,
            .positions = layout.positions,
            .logits = logits.as<T>(),
            .kind = indices ? TargetKind::indices : TargetKind::probabilities,
            .target = indices ? class_indices(*indices) : ClassIndices{},
            .probabilities = probabilities ? probabilities->template as<T>() : ClassScores<const T>{},
            .weight = weight ? static_cast<const T*>(weight->const_data_ptr()) : nullptr,
            .ignore_index = ignore_index,
            .label_smoothing = label_smoothing,
            .reduction = reduction};
  }

  // Raises for the position that a kernel found, if it found one.
  void check_class(const char* op, int64_t bad_position) const {
    if (bad_position < 0) return;
    int64_t rest = bad_position;
    std::string index;
    for (int64_t dim = indices->dim() - 1; dim >= 0; --dim) {
      index = std::to_string(rest % indices->size(dim)) + (index.empty() ? "" : ", ") + index;
      rest /= indices->size(dim);
    }
    fail<std::out_of_range>(op, ": target: expected class indices in [0, ", layout.classes,
                            ") or ignore_index = ", ignore_index, ", got ", class_indices(*indices)[bad_position],
                            " at [", index, "]");
  }
};

// The arguments of cross_entropy_backward, and its results.
struct BackwardOperands {
  Operands operands;
  Tensor grad_output, stats;  // the tensors themselves, or contiguous copies where their strides cannot be expressed
  const Tensor& total_weight;
  int64_t grad_output_stride = 1;
  Tensor grad_logits, grad_target;  // undefined where not needed

  BackwardOperands(const char* op, const Tensor& dy, const Tensor& logits, const Tensor& target,
                   const std::optional<Tensor>& weight, const Tensor& statistics, const Tensor& total,
                   int64_t ignore_index, double label_smoothing, int64_t reduction, bool need_logits, bool need_target)
      // Checked before they are taken apart.
      : operands((check_operands(op, logits, target, weight, ignore_index, label_smoothing, reduction), logits), target,
                 weight, ignore_index, label_smoothing, reduction),
        grad_output(dy),
        stats(statistics),
        total_weight(total) {
    check_grad_output(op, dy, logits, operands.reduction);
    check_statistics(op, logits, stats, total_weight);
    check(!need_target || operands.probabilities, op,
          ": need_target: expected false, as target holds class indices, got true");
    if (need_logits) grad_logits = operands.layout.gradient(logits);
    if (need_target) grad_target = operands.layout.gradient(logits);
    if (const std::optional<int64_t> stride = merged_stride(dy, 0, dy.dim())) {
      grad_output_stride = *stride;
    } else {
      grad_output = torch::stable::contiguous(dy);
    }
    stats = made_contiguous(stats);
  }

  template <class T>
  CrossEntropyBackward<T> arguments() const {
    using A = ComputeType<T>;
    const A* position_max = static_cast<const A*>(stats.const_data_ptr());
    return {.problem = operands.problem<T>(),
            .grad_output = static_cast<const T*>(grad_output.const_data_ptr()),
            .grad_output_stride = grad_output_stride,
            .position_max = position_max,
            .position_log_sum = position_max + stats.numel() / 2,
            .total_weight = static_cast<const A*>(total_weight.const_data_ptr()),
            .grad_logits = data_of<T>(grad_logits),
            .grad_probabilities = data_of<T>(grad_target)};
  }
};

}  // namespace mnist_ext::ops
