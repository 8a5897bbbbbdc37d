// The cross_entropy ops: checks, allocation, dispatch on the dtype.
#include <string>
#include <tuple>

#include "device.h"
#include "schemas.h"

namespace mnist_ext::ops {
namespace {

int64_t class_dim(const Tensor& logits) { return logits.dim() == 1 ? 0 : 1; }

// The shape of logits without the dimension of the classes, which is the second one, or the only one.
class Positions {
 public:
  explicit Positions(const Tensor& logits) : dims_(logits.dim() - 1) {
    stats_sizes_[0] = 2;
    for (int64_t i = 0; i < dims_; ++i) stats_sizes_[i + 1] = logits.size(i == 0 ? 0 : i + 1);
  }

  // Of stats: the maximum of each position, and its log-sum-exp.
  const int64_t* stats_sizes() const { return stats_sizes_; }
  const int64_t* sizes() const { return stats_sizes_ + 1; }
  int64_t dims() const { return dims_; }

  bool is_shape_of(const Tensor& t) const { return has_sizes(t, sizes(), dims_); }
  bool is_shape_of_stats(const Tensor& t) const { return has_sizes(t, stats_sizes_, dims_ + 1); }

  friend std::ostream& operator<<(std::ostream& out, const Positions& p) { return out << Sizes{p.sizes(), p.dims()}; }

 private:
  int64_t dims_;
  int64_t stats_sizes_[kMaxDims];
};

// Calls visit for each dimension of a tensor [N, C, d1, ...] that lies in memory as [N, d1, ..., C], the innermost
// first.
template <class Visit>
void for_dims_with_classes_last(int64_t dims, const Visit& visit) {
  visit(1);
  for (int64_t dim = dims - 1; dim >= 2; --dim) visit(dim);
  visit(0);
}

bool lies_with_classes_last(const Tensor& t) {  // mnist_ext/_fake.py has the same rule
  if (t.numel() == 0) return true;
  int64_t expected = 1;
  bool fits = true;
  for_dims_with_classes_last(t.dim(), [&](int64_t dim) {
    fits = fits && (t.size(dim) == 1 || t.stride(dim) == expected);
    expected *= t.size(dim);
  });
  return fits;
}

// Where logits, probabilities and their gradients lie, in the kernels' terms.
struct Layout {
  int64_t batch = 1, classes, positions = 1;
  bool classes_last;  // logits [N, C, d1, ...] that lie in memory as [N, d1, ..., C]: a matrix

  Layout(const Tensor& logits, bool indices) : classes(logits.size(class_dim(logits))) {
    const int64_t dims = logits.dim();
    if (dims > 1) batch = logits.size(0);
    for (int64_t i = 2; i < dims; ++i) positions *= logits.size(i);
    classes_last = dims > 2 && indices && lies_with_classes_last(logits);
    if (classes_last) {
      batch *= positions;
      positions = 1;
    }
  }

  // An uninitialized tensor of the shape of `logits`, laid out as the kernels write gradients.
  Tensor gradient(const Tensor& logits) const {
    const int64_t dims = logits.dim();
    int64_t sizes[kMaxDims], strides[kMaxDims];
    for (int64_t i = 0; i < dims; ++i) sizes[i] = logits.size(i);
    if (!classes_last) return empty(logits, dtype_of(logits), sizes, dims);
    int64_t stride = 1;
    for_dims_with_classes_last(dims, [&](int64_t dim) {
      strides[dim] = stride;
      stride *= sizes[dim] > 1 ? sizes[dim] : 1;
    });
    return empty_strided(logits, dtype_of(logits), sizes, strides, dims);
  }

  // Whether t could have been made by gradient().
  bool is_gradient(const Tensor& t, const Tensor& logits) const {
    return same_sizes(t, logits) && (classes_last ? lies_with_classes_last(t) : t.is_contiguous());
  }
};

// Logits or probabilities as the kernels want them.
struct Scores {
  Tensor tensor;  // the tensor itself, or a contiguous copy where its strides cannot be expressed
  int64_t batch_stride, class_stride = 1;

  Scores(const Tensor& t, const Layout& layout) : tensor(t), batch_stride(layout.classes) {
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

void check_probabilities(const char* op, const Tensor& logits, const Tensor& target, int64_t ignore_index) {
  check_operand(op, "target", target, "logits", logits, same_sizes(target, logits),
                "probabilities of the shape of logits, ", Shape(logits));
  check(ignore_index < 0, op, ": ignore_index: expected a negative number, as target holds probabilities, got ",
        ignore_index);
}

void check_indices(const char* op, const Tensor& logits, const Tensor& target) {
  check(has_class_indices(target), op,
        ": target: expected class indices of dtype int64, int32 or uint8, or probabilities of the shape and dtype of "
        "logits, ",
        Shape(logits), " ", DtypeName(logits), ", got ", Shape(target), " ", DtypeName(target));
  check_device(op, "target", target, "logits", logits);
  const Positions positions(logits);
  if (positions.is_shape_of(target)) return;
  // A batch size of its own is a ValueError in PyTorch, another shape a RuntimeError.
  const bool same_batch = logits.dim() == 1 || (target.dim() > 0 && target.size(0) == logits.size(0));
  check<std::invalid_argument>(same_batch, op, ": target: expected shape ", positions, " for logits ", Shape(logits),
                               ", got ", Shape(target));
  fail<std::runtime_error>(op, ": target: expected shape ", positions, " for logits ", Shape(logits), ", got ",
                           Shape(target));
}

void check_operands(const char* op, const Tensor& logits, const Tensor& target, const std::optional<Tensor>& weight,
                    int64_t ignore_index, double label_smoothing, int64_t reduction) {
  check_floating(op, "logits", logits);
  check(1 <= logits.dim() && logits.dim() <= kMaxDims, op, ": logits: expected [C], [N, C] or [N, C, d1, ...], got ",
        Shape(logits));
  is_floating(target) ? check_probabilities(op, logits, target, ignore_index) : check_indices(op, logits, target);
  if (weight) {
    const int64_t classes = logits.size(class_dim(logits));
    check_operand(op, "weight", *weight, "logits", logits, weight->dim() == 1 && weight->size(0) == classes, "shape [",
                  classes, "], one for each class");
  }
  check(0 <= label_smoothing && label_smoothing <= 1, op, ": label_smoothing: expected a number in [0, 1], got ",
        label_smoothing);
  check<std::invalid_argument>(0 <= reduction && reduction <= 2, op,
                               ": reduction: expected 0 (none), 1 (mean) or 2 (sum), got ", reduction);
}

// What all four ops are given, checked, and in the kernels' terms.
struct Operands {
  const char* op;
  Layout layout;
  Reduction reduction;
  Scores logits;
  std::optional<Scores> probabilities{};
  std::optional<Tensor> indices{}, weight{};
  int64_t ignore_index;
  double label_smoothing;

  Operands(const char* name, const Tensor& x, const Tensor& target, const std::optional<Tensor>& class_weight,
           int64_t ignored, double smoothing, int64_t reduced)
      // Checked before they are taken apart.
      : op((check_operands(name, x, target, class_weight, ignored, smoothing, reduced), name)),
        layout(x, !is_floating(target)),
        reduction(static_cast<Reduction>(reduced)),
        logits(x, layout),
        ignore_index(ignored),
        label_smoothing(smoothing) {
    if (is_floating(target)) {
      probabilities.emplace(target, layout);
    } else {
      indices = made_contiguous(target);
    }
    if (class_weight) weight = made_contiguous(*class_weight);
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

  void check_reduced() const {
    check<std::invalid_argument>(reduction != Reduction::none, op, ": reduction: expected 1 (mean) or 2 (sum), got 0");
  }

  void check_class(int64_t bad_position) const {
    if (indices) ops::check_class(op, *indices, bad_position, layout.classes, ignore_index);
  }
};

void check_grad_output(const char* op, const Tensor& grad_output, const Tensor& logits, Reduction reduction) {
  if (reduction == Reduction::none) {
    const Positions positions(logits);
    check_operand(op, "grad_output", grad_output, "logits", logits, positions.is_shape_of(grad_output), "shape ",
                  positions, " for reduction none");
  } else {
    check_like(op, "grad_output", grad_output, "logits", logits);
    check(grad_output.numel() == 1, op, ": grad_output: expected one element, got shape ", Shape(grad_output));
  }
}

// What the backward gets from the forward.
void check_statistics(const char* op, const Tensor& logits, const Tensor& stats, const Tensor& total_weight) {
  const Positions positions(logits);
  check(positions.is_shape_of_stats(stats), op, ": stats: expected shape [2, ...] with ", positions, " for ..., got ",
        Shape(stats));
  check(total_weight.numel() == 1, op, ": total_weight: expected one element, got shape ", Shape(total_weight));
  for (const Tensor* t : {&stats, &total_weight}) {
    const char* argument = t == &stats ? "stats" : "total_weight";
    check(dtype_of(*t) == compute_dtype_of(logits), op, ": ", argument,
          ": expected float64 for logits of float64, else float32, got ", DtypeName(*t));
    check_device(op, argument, *t, "logits", logits);
  }
}

// What the forward kernel writes; null: not wanted.
struct Outputs {
  const Tensor* loss = nullptr;
  const Tensor* stats = nullptr;
  const Tensor* total_weight = nullptr;
  const Tensor* grad_logits = nullptr;
};

// grad_output: null, or what a gradient that was formed without is made that of.
void forward(const Tensor& logits, const Operands& operands, const Outputs& outputs,
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
    operands.check_class(kernels<T>().cross_entropy_forward(args, workspace, device.launch()));
  });
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& target,
                                                 const std::optional<Tensor>& weight, int64_t ignore_index,
                                                 double label_smoothing, int64_t reduction) {
  const Operands operands("mnist_ext.cross_entropy", logits, target, weight, ignore_index, label_smoothing, reduction);
  const Positions positions(logits);
  const bool none = operands.reduction == Reduction::none;
  const Tensor loss = empty(logits, dtype_of(logits), positions.sizes(), none ? positions.dims() : 0);
  const Tensor stats = empty(logits, compute_dtype_of(logits), positions.stats_sizes(), positions.dims() + 1);
  const Tensor total_weight = empty(logits, compute_dtype_of(logits), {});
  forward(logits, operands, {.loss = &loss, .stats = &stats, .total_weight = &total_weight});
  return {loss, stats, total_weight};
}

std::tuple<Tensor, Tensor> cross_entropy_with_gradient(const Tensor& logits, const Tensor& target,
                                                       const std::optional<Tensor>& weight, int64_t ignore_index,
                                                       double label_smoothing, int64_t reduction) {
  const Operands operands("mnist_ext.cross_entropy_with_gradient", logits, target, weight, ignore_index,
                          label_smoothing, reduction);
  operands.check_reduced();
  const Tensor loss = empty(logits, {});
  const Tensor grad_logits = operands.layout.gradient(logits);
  forward(logits, operands, {.loss = &loss, .grad_logits = &grad_logits});
  return {loss, grad_logits};
}

void cross_entropy_gradient_(const Tensor& gradient, const Tensor& grad_output, const Tensor& logits,
                             const Tensor& target, const std::optional<Tensor>& weight, int64_t ignore_index,
                             double label_smoothing, int64_t reduction) {
  constexpr const char* kOp = "mnist_ext.cross_entropy_gradient_";
  const Operands operands(kOp, logits, target, weight, ignore_index, label_smoothing, reduction);
  operands.check_reduced();
  check_grad_output(kOp, grad_output, logits, operands.reduction);
  check_operand(kOp, "gradient", gradient, "logits", logits, operands.layout.is_gradient(gradient, logits),
                "what cross_entropy_with_gradient returned for logits ", Shape(logits));
  forward(logits, operands, {.grad_logits = &gradient}, &grad_output);
}

std::tuple<Tensor, Tensor> cross_entropy_backward(const Tensor& grad_output, const Tensor& logits, const Tensor& target,
                                                  const std::optional<Tensor>& weight, const Tensor& stats,
                                                  const Tensor& total_weight, int64_t ignore_index,
                                                  double label_smoothing, int64_t reduction, bool need_logits,
                                                  bool need_target) {
  constexpr const char* kOp = "mnist_ext.cross_entropy_backward";
  const Operands operands(kOp, logits, target, weight, ignore_index, label_smoothing, reduction);
  check_grad_output(kOp, grad_output, logits, operands.reduction);
  check_statistics(kOp, logits, stats, total_weight);
  check(!need_target || !operands.indices, kOp,
        ": need_target: expected false, as target holds class indices, got true");
  Tensor grad_logits, grad_target;  // undefined where not needed
  if (need_logits) grad_logits = operands.layout.gradient(logits);
  if (need_target) grad_target = operands.layout.gradient(logits);
  const std::optional<int64_t> stride = merged_stride(grad_output, 0, grad_output.dim());
  const Tensor dy = stride ? grad_output : torch::stable::contiguous(grad_output);
  const Tensor statistics = made_contiguous(stats);
  OnDevice device(logits);
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    using A = ComputeType<T>;
    const A* position_max = static_cast<const A*>(statistics.const_data_ptr());
    const CrossEntropyBackward<T> args = {.problem = operands.problem<T>(),
                                          .grad_output = static_cast<const T*>(dy.const_data_ptr()),
                                          .grad_output_stride = stride.value_or(1),
                                          .position_max = position_max,
                                          .position_log_sum = position_max + statistics.numel() / 2,
                                          .total_weight = static_cast<const A*>(total_weight.const_data_ptr()),
                                          .grad_logits = data_of<T>(grad_logits),
                                          .grad_probabilities = data_of<T>(grad_target)};
    operands.check_class(kernels<T>().cross_entropy_backward(args, device.launch()));
  });
  return {grad_logits, grad_target};
}

}  // namespace

void implement_cross_entropy(Library& m) {
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
  m.impl("cross_entropy_with_gradient", TORCH_BOX(&cross_entropy_with_gradient));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&cross_entropy_gradient_));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
}

}  // namespace mnist_ext::ops
