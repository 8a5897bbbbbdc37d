// linear_cross_entropy: checks, allocation, dispatch on the dtype.
#include "../programs/linear_cross_entropy.h"

#include <string>
#include <tuple>
#include <vector>

#include "device.h"
#include "schemas.h"

namespace mnist_ext::ops {
namespace {

constexpr const char* kOp = "mnist_ext.linear_cross_entropy";

using SizeList = std::vector<int64_t>;

Sizes in_words(const SizeList& sizes) { return {sizes.data(), static_cast<int64_t>(sizes.size())}; }

bool fits(const Tensor& t, const SizeList& sizes) {
  return has_sizes(t, sizes.data(), static_cast<int64_t>(sizes.size()));
}

Tensor empty_of(const Tensor& like, const SizeList& sizes) {
  return empty(like, dtype_of(like), sizes.data(), static_cast<int64_t>(sizes.size()));
}

Tensor contiguous_like(const Tensor& t) { return empty_of(t, SizeList(t.sizes().begin(), t.sizes().end())); }

struct Arguments {
  const Tensor &input, &linear_weight;
  const std::optional<Tensor>& linear_bias;
  const Tensor& target;
  const std::optional<Tensor>& weight;
  int64_t ignore_index;
  double label_smoothing;
  int64_t reduction;
  const std::optional<Tensor>& grad_output;
  bool allow_tf32;
};

// The arguments, checked, and in the kernels' terms.
class Operands {
 public:
  explicit Operands(const Arguments& args)
      : args_((check_layer(args), args)),
        input_(as_matrix(args.input, Strides::one_of_them_1)),
        linear_weight_(as_matrix(args.linear_weight, Strides::one_of_them_1)),
        classes_(args.linear_weight.size(0)),
        positions_sizes_(without_last(args.input)) {
    for (int64_t i = 1; i + 1 < args.linear_weight.dim(); ++i) positions_sizes_.push_back(args.linear_weight.size(i));
    check_loss();
    if (args.linear_bias) linear_bias_ = made_contiguous(*args.linear_bias);
    if (args.weight) weight_ = made_contiguous(*args.weight);
    target_ = made_contiguous(args.target);
    if (!args.grad_output) return;
    grad_output_stride_ = merged_stride(*args.grad_output, 0, args.grad_output->dim());
    grad_output_ = grad_output_stride_ ? *args.grad_output : torch::stable::contiguous(*args.grad_output);
  }

  bool has_reduction() const { return reduction() != Reduction::none; }
  int64_t batch() const { return input_.rows; }
  int64_t outputs() const { return linear_weight_.rows; }
  const SizeList& positions_sizes() const { return positions_sizes_; }

  template <class T>
  Layer<T> layer() const {
    return {.batch = batch(),
            .in_features = input_.columns,
            .out_features = outputs(),
            .input = input_.view<T>(),
            .weight = linear_weight_.view<T>(),
            .bias = pointer<T>(linear_bias_),
            .relu = false,
            .allow_tf32 = args_.allow_tf32,
            .out = nullptr};
  }

  template <class T>
  CrossEntropyProblem<T> problem() const {
    const bool indices = has_class_indices(target_);
    const int64_t positions = classes_ > 0 ? outputs() / classes_ : 1;
    ClassScores<const T> probabilities{};
    if (!indices) probabilities = {static_cast<const T*>(target_.const_data_ptr()), outputs(), positions};
    return {.batch = batch(),
            .classes = classes_,
            .positions = positions,
            .logits = {},
            .kind = indices ? TargetKind::indices : TargetKind::probabilities,
            .target = indices ? class_indices(target_) : ClassIndices{},
            .probabilities = probabilities,
            .weight = pointer<T>(weight_),
            .ignore_index = args_.ignore_index,
            .label_smoothing = args_.label_smoothing,
            .reduction = reduction()};
  }

  template <class T>
  const T* grad_output() const {
    return pointer<T>(grad_output_);
  }
  int64_t grad_output_stride() const { return has_reduction() ? 0 : grad_output_stride_.value_or(1); }

  void check_class(int64_t bad_position) const {
    ops::check_class(kOp, target_, bad_position, classes_, args_.ignore_index);
  }

 private:
  static SizeList without_last(const Tensor& t) { return SizeList(t.sizes().begin(), t.sizes().end() - 1); }

  template <class T>
  static const T* pointer(const std::optional<Tensor>& t) {
    return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
  }

  Reduction reduction() const { return static_cast<Reduction>(args_.reduction); }

  static void check_layer(const Arguments& args) {
    const Tensor &input = args.input, &linear_weight = args.linear_weight;
    const ScalarType dtype = input.scalar_type();
    check(dtype == ScalarType::Float || dtype == ScalarType::Double, kOp, ": input: expected float32 or float64, got ",
          DtypeName(input));
    check(input.dim() == 1 || input.dim() == 2, kOp, ": input: expected [in_features] or [N, in_features], got ",
          Shape(input));
    check_operand(kOp, "linear_weight", linear_weight, "input", input,
                  2 <= linear_weight.dim() && linear_weight.dim() <= kMaxDims &&
                      linear_weight.size(linear_weight.dim() - 1) == input.size(input.dim() - 1),
                  "[C, in_features] or [C, d1, ..., in_features] for input ", Shape(input));
    check(linear_weight.dim() == 2 || input.dim() == 2, kOp, ": input: expected [N, in_features] for linear_weight ",
          Shape(linear_weight), ", got ", Shape(input));
    const SizeList outputs = without_last(linear_weight);
    if (const std::optional<Tensor>& bias = args.linear_bias) {
      check_operand(kOp, "linear_bias", *bias, "input", input, fits(*bias, outputs), "shape ", in_words(outputs));
    }
    if (const std::optional<Tensor>& weight = args.weight) {
      check_operand(kOp, "weight", *weight, "input", input, fits(*weight, SizeList{linear_weight.size(0)}), "shape [",
                    linear_weight.size(0), "], one for each class");
    }
    check(0 <= args.label_smoothing && args.label_smoothing <= 1, kOp,
          ": label_smoothing: expected a number in [0, 1], got ", args.label_smoothing);
    check<std::invalid_argument>(0 <= args.reduction && args.reduction <= 2, kOp,
                                 ": reduction: expected 0 (none), 1 (mean) or 2 (sum), got ", args.reduction);
  }

  void check_loss() const {
    const Tensor& target = args_.target;
    if (is_floating(target)) {
      SizeList logits = without_last(args_.input);
      const SizeList outputs = without_last(args_.linear_weight);
      logits.insert(logits.end(), outputs.begin(), outputs.end());
      check_operand(kOp, "target", target, "input", args_.input, fits(target, logits), "probabilities of shape ",
                    in_words(logits));
    } else {
      check(has_class_indices(target), kOp,
            ": target: expected class indices of dtype int64, int32 or uint8, or probabilities, got ",
            DtypeName(target));
      check_device(kOp, "target", target, "input", args_.input);
      check(fits(target, positions_sizes_), kOp, ": target: expected shape ", in_words(positions_sizes_), ", got ",
            Shape(target));
    }
    if (const std::optional<Tensor>& grad = args_.grad_output) {
      check_operand(kOp, "grad_output", *grad, "input", args_.input,
                    has_reduction() ? grad->numel() == 1 : fits(*grad, positions_sizes_), "the shape of the loss");
    }
  }

  Arguments args_;
  Matrix input_, linear_weight_;
  int64_t classes_;
  SizeList positions_sizes_;
  Tensor target_;
  std::optional<Tensor> linear_bias_, weight_, grad_output_;
  std::optional<int64_t> grad_output_stride_;
};

template <class T>
void run(const Operands& operands, LinearCrossEntropy<T>& args, OnDevice& device) {
  const LinearCrossEntropyProgram<T> counted(args, kernel_table().blocks, kNowhere);
  std::vector<Entry<T>> entries = counted.entries();
  const int64_t count = static_cast<int64_t>(entries.size()), bytes = counted.workspace_bytes();
  const int64_t bytes_of_entries = kernels<T>().workspace_bytes({entries.data(), count, kProductGrain});
  char* workspace = static_cast<char*>(device.workspace(bytes + std::max(bytes_of_entries, kWeighTargetsBytes)));
  operands.check_class(kernels<T>().weigh_targets(args.problem, args.divisor, workspace + bytes, device.launch()));
  entries = LinearCrossEntropyProgram<T>(args, kernel_table().blocks, workspace).entries();
  kernels<T>().run({entries.data(), count, kProductGrain}, workspace + bytes, device.launch());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    const Tensor& input, const Tensor& linear_weight, const std::optional<Tensor>& linear_bias, const Tensor& target,
    const std::optional<Tensor>& weight, int64_t ignore_index, double label_smoothing, int64_t reduction,
    const std::optional<Tensor>& grad_output, bool need_input, bool need_weight, bool need_bias, bool allow_tf32,
    double softcap, double z_loss, bool need_lse, const std::optional<Tensor>& grad_lse) {
  const Operands operands({input, linear_weight, linear_bias, target, weight, ignore_index, label_smoothing, reduction,
                           grad_output, allow_tf32});
  check(!need_bias || linear_bias, kOp, ": need_bias: expected false without linear_bias, got true");
  if (softcap != 0 || z_loss != 0 || need_lse || grad_lse) {
    check(kernel_table().blocks.flops_per_byte > 0 && has_class_indices(target) && linear_weight.dim() == 2 &&
              linear_weight.size(0) > 0 && label_smoothing == 0 && (z_loss == 0 || !weight),
          kOp, ": softcap, z_loss, need_lse, grad_lse: expected kernels of the CPU, class indices, linear_weight [C, ",
          "in_features], C > 0, no label_smoothing, and no weight beside z_loss");
  }
  if (grad_lse) {
    check_operand(kOp, "grad_lse", *grad_lse, "input", input, fits(*grad_lse, operands.positions_sizes()), "shape ",
                  in_words(operands.positions_sizes()));
  }
  OnDevice device(input);
  Tensor losses, grad_input, grad_weight, grad_bias, lse;  // undefined where not wanted
  if (need_lse) lse = empty_of(input, operands.positions_sizes());
  if (need_input) grad_input = contiguous_like(input);
  if (need_weight) grad_weight = contiguous_like(linear_weight);
  if (need_bias) grad_bias = contiguous_like(*linear_bias);
  const Tensor divisor = empty(input, {});
  dispatch_float_or_double(input, [&](auto zero) {
    using T = decltype(zero);
    LinearCrossEntropy<T> args = {.layer = operands.layer<T>(),
                                  .problem = operands.problem<T>(),
                                  .divisor = data_of<T>(divisor),
                                  .grad_output = operands.grad_output<T>(),
                                  .grad_output_stride = operands.grad_output_stride(),
                                  .loss = nullptr,
                                  .softcap = static_cast<T>(softcap),
                                  .z_loss = static_cast<T>(z_loss),
                                  .lse = data_of<T>(lse)};
    if (grad_lse) {
      args.grad_lse = static_cast<const T*>(grad_lse->const_data_ptr());
      args.grad_lse_stride = grad_lse->dim() == 0 ? 0 : grad_lse->stride(0);
    }
    args.layer.grad_input = data_of<T>(grad_input);
    args.layer.grad_weight = data_of<T>(grad_weight);
    args.layer.grad_bias = data_of<T>(grad_bias);
    if (!grad_output) {
      const int64_t count = LinearCrossEntropyProgram<T>(args, kernel_table().blocks, kNowhere).losses();
      losses = operands.has_reduction() ? empty(input, {count}) : empty_of(input, operands.positions_sizes());
      args.loss = data_of<T>(losses);
    }
    run(operands, args, device);
  });
  if (losses.defined() && operands.has_reduction()) losses = torch::stable::sum(losses);
  return {losses, grad_input, grad_weight, grad_bias, lse};
}

}  // namespace

void implement_linear_cross_entropy(Library& m) { m.impl("linear_cross_entropy", TORCH_BOX(&linear_cross_entropy)); }

}  // namespace mnist_ext::ops
