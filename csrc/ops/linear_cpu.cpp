// linear and linear_backward on the CPU: checks, allocation, dispatch on the dtype.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../kernels/linear.h"
#include "tensors.h"

namespace mnist_ext::ops {
namespace {

constexpr const char* kLinear = "mnist_ext.linear";
constexpr const char* kBackward = "mnist_ext.linear_backward";

void check_operands(const char* op, const Tensor& input, const Tensor& weight) {
  check_floating(op, "input", input);
  check_like(op, "weight", weight, "input", input);
  check(1 <= input.dim() && input.dim() <= kMaxDims, op, ": input: expected 1 to ", kMaxDims, " dimensions, got ",
        input.dim());
  check(weight.dim() == 2, op, ": weight: expected 2 dimensions [out_features, in_features], got shape ",
        Shape(weight));
  check(input.size(input.dim() - 1) == weight.size(1), op,
        ": input: expected its last dimension to be in_features = ", weight.size(1), " of weight ", Shape(weight),
        ", got shape ", Shape(input));
}

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, bool relu) {
  check_operands(kLinear, input, weight);
  const int64_t out_features = weight.size(0);
  if (bias) {
    check_like(kLinear, "bias", *bias, "input", input);
    check(bias->dim() == 1 && bias->size(0) == out_features, kLinear, ": bias: expected shape [", out_features,
          "] for weight ", Shape(weight), ", got ", Shape(*bias));
  }
  int64_t out_sizes[kMaxDims];
  const int64_t dims = input.dim();
  for (int64_t i = 0; i < dims - 1; ++i) out_sizes[i] = input.size(i);
  out_sizes[dims - 1] = out_features;
  const Tensor out = empty(dtype_of(input), out_sizes, dims);

  const Matrix x = as_matrix(input), w = as_matrix(weight);
  std::optional<Tensor> b;
  if (bias) b = torch::stable::contiguous(*bias);
  dispatch_floating(input, [&](auto zero) {
    using T = decltype(zero);
    linear_forward<T>({.rows = x.rows,
                       .in_features = x.columns,
                       .out_features = out_features,
                       .input = x.data<T>(),
                       .input_stride = x.stride,
                       .weight = w.data<T>(),
                       .weight_stride = w.stride,
                       .bias = b ? static_cast<const T*>(b->const_data_ptr()) : nullptr,
                       .activation = relu ? Activation::relu : Activation::none,
                       .out = static_cast<T*>(out.mutable_data_ptr())},
                      threads());
  });
  return out;
}

// All of shape [..., columns] with the same leading dimensions.
bool same_leading_dimensions(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t i = 0; same && i < a.dim() - 1; ++i) same = a.size(i) == b.size(i);
  return same;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad_output, const std::optional<Tensor>& input,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& output, bool need_bias) {
  check_floating(kBackward, "grad_output", grad_output);
  const int64_t dims = grad_output.dim();
  check(1 <= dims && dims <= kMaxDims, kBackward, ": grad_output: expected 1 to ", kMaxDims, " dimensions, got ", dims);
  const int64_t out_features = grad_output.size(dims - 1);
  int64_t in_features = 0;
  if (weight) {
    check_like(kBackward, "weight", *weight, "grad_output", grad_output);
    check(weight->dim() == 2 && weight->size(0) == out_features, kBackward, ": weight: expected shape [", out_features,
          ", in_features] for grad_output ", Shape(grad_output), ", got ", Shape(*weight));
    in_features = weight->size(1);
  }
  if (input) {
    check_like(kBackward, "input", *input, "grad_output", grad_output);
    check(same_leading_dimensions(*input, grad_output), kBackward,
          ": input: expected the leading dimensions of grad_output ", Shape(grad_output), ", got ", Shape(*input));
    if (weight) {
      check(input->size(dims - 1) == in_features, kBackward,
            ": input: expected its last dimension to be in_features = ", in_features, " of weight ", Shape(*weight),
            ", got shape ", Shape(*input));
    }
    in_features = input->size(dims - 1);
  }
  if (output) {
    check_like(kBackward, "output", *output, "grad_output", grad_output);
    check(same_leading_dimensions(*output, grad_output) && output->size(dims - 1) == out_features, kBackward,
          ": output: expected the shape of grad_output, ", Shape(grad_output), ", got ", Shape(*output));
  }

  Tensor grad_input, grad_weight, grad_bias;  // undefined where not needed
  if (weight) {
    int64_t sizes[kMaxDims];
    for (int64_t i = 0; i < dims - 1; ++i) sizes[i] = grad_output.size(i);
    sizes[dims - 1] = in_features;
    grad_input = empty(dtype_of(grad_output), sizes, dims);
  }
  if (input) grad_weight = empty(dtype_of(grad_output), {out_features, in_features});
  if (need_bias) grad_bias = empty(dtype_of(grad_output), {out_features});

  const Matrix dy = as_matrix(grad_output);
  const auto matrix = [](const std::optional<Tensor>& t) {
    return t ? std::optional<Matrix>(as_matrix(*t)) : std::nullopt;
  };
  const std::optional<Matrix> x = matrix(input), w = matrix(weight), y = matrix(output);
  dispatch_floating(grad_output, [&](auto zero) {
    using T = decltype(zero);
    const auto data = [](const std::optional<Matrix>& m) { return m ? m->template data<T>() : nullptr; };
    const auto stride = [](const std::optional<Matrix>& m) { return m ? m->stride : 0; };
    const auto out = [](const Tensor& t) { return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr; };
    mnist_ext::linear_backward<T>({.rows = dy.rows,
                                   .in_features = in_features,
                                   .out_features = out_features,
                                   .grad_output = dy.data<T>(),
                                   .grad_output_stride = dy.stride,
                                   .output = data(y),
                                   .output_stride = stride(y),
                                   .input = data(x),
                                   .input_stride = stride(x),
                                   .weight = data(w),
                                   .weight_stride = stride(w),
                                   .grad_input = out(grad_input),
                                   .grad_weight = out(grad_weight),
                                   .grad_bias = out(grad_bias)},
                                  threads());
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ext, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace mnist_ext::ops
