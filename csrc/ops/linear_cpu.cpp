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
        shape(weight));
  check(input.size(input.dim() - 1) == weight.size(1), op,
        ": input: expected its last dimension to be in_features = ", weight.size(1), " of weight ", shape(weight),
        ", got shape ", shape(input));
}

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, bool relu) {
  check_operands(kLinear, input, weight);
  const int64_t out_features = weight.size(0);
  if (bias) {
    check_like(kLinear, "bias", *bias, "input", input);
    check(bias->dim() == 1 && bias->size(0) == out_features, kLinear, ": bias: expected shape [", out_features,
          "] for weight ", shape(weight), ", got ", shape(*bias));
  }
  int64_t out_sizes[kMaxDims];
  const int64_t dims = input.dim();
  for (int64_t i = 0; i < dims - 1; ++i) out_sizes[i] = input.size(i);
  out_sizes[dims - 1] = out_features;
  const Tensor out = empty(input, out_sizes, dims);

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

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                   const std::optional<Tensor>& output, bool need_input,
                                                   bool need_weight, bool need_bias) {
  check_operands(kBackward, input, weight);
  const int64_t in_features = weight.size(1), out_features = weight.size(0);
  const auto check_out_shape = [&](const char* argument, const Tensor& t) {
    check_like(kBackward, argument, t, "input", input);
    bool equal = t.dim() == input.dim() && t.size(t.dim() - 1) == out_features;
    for (int64_t i = 0; equal && i < t.dim() - 1; ++i) equal = t.size(i) == input.size(i);
    check(equal, kBackward, ": ", argument, ": expected the shape of linear(input, weight) for input ", shape(input),
          " and weight ", shape(weight), ", got ", shape(t));
  };
  check_out_shape("grad_output", grad_output);
  if (output) check_out_shape("output", *output);

  Tensor grad_input, grad_weight, grad_bias;  // undefined where not needed
  if (need_input) grad_input = empty(input, input.sizes().data(), input.dim());
  if (need_weight) grad_weight = empty(weight, {out_features, in_features});
  if (need_bias) grad_bias = empty(weight, {out_features});

  const Matrix dy = as_matrix(grad_output), x = as_matrix(input), w = as_matrix(weight);
  std::optional<Matrix> y;
  if (output) y = as_matrix(*output);
  dispatch_floating(input, [&](auto zero) {
    using T = decltype(zero);
    const auto out = [](const Tensor& t) { return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr; };
    mnist_ext::linear_backward<T>({.rows = x.rows,
                                   .in_features = in_features,
                                   .out_features = out_features,
                                   .grad_output = dy.data<T>(),
                                   .grad_output_stride = dy.stride,
                                   .output = y ? y->data<T>() : nullptr,
                                   .output_stride = y ? y->stride : 0,
                                   .input = x.data<T>(),
                                   .input_stride = x.stride,
                                   .weight = w.data<T>(),
                                   .weight_stride = w.stride,
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
