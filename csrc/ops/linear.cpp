// linear and linear_backward on the CPU: checks, allocation, dispatch on the dtype.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../kernels/linear.h"
#include "linear_operands.h"

namespace mnist_ext::ops {
namespace {

constexpr const char* kLinear = "mnist_ext.linear";
constexpr const char* kBackward = "mnist_ext.linear_backward";

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, bool relu,
              bool /* allow_tf32 */) {
  check_linear(kLinear, input, weight, bias);
  const int64_t out_features = weight.size(0);
  const Tensor out = empty_with_columns(input, out_features);

  const Matrix x = as_matrix(input, true), w = as_matrix(weight, true);
  std::optional<Tensor> b;
  if (bias) b = made_contiguous(*bias);
  dispatch_floating(input, [&](auto zero) {
    using T = decltype(zero);
    linear_forward<T>({.rows = x.rows,
                       .in_features = x.columns,
                       .out_features = out_features,
                       .input = view_of<T>(x),
                       .weight = view_of<T>(w),
                       .bias = b ? static_cast<const T*>(b->const_data_ptr()) : nullptr,
                       .activation = relu ? Activation::relu : Activation::none,
                       .out = static_cast<T*>(out.mutable_data_ptr())},
                      threads());
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad_output, const std::optional<Tensor>& input,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& output, bool need_bias,
                                                   bool /* allow_tf32 */) {
  const LinearGradients gradients(kBackward, grad_output, input, weight, output, need_bias);
  const Matrix dy = as_matrix(grad_output);
  const auto matrix = [](const std::optional<Tensor>& t, bool column_major_too) {
    return t ? std::optional<Matrix>(as_matrix(*t, column_major_too)) : std::nullopt;
  };
  const std::optional<Matrix> x = matrix(input, true), w = matrix(weight, true), y = matrix(output, false);
  dispatch_floating(grad_output, [&](auto zero) {
    using T = decltype(zero);
    const auto view = [](const std::optional<Matrix>& m) { return m ? view_of<T>(*m) : MatrixView<T>{}; };
    const auto out = [](const Tensor& t) { return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr; };
    mnist_ext::linear_backward<T>({.rows = dy.rows,
                                   .in_features = gradients.in_features,
                                   .out_features = gradients.out_features,
                                   .grad_output = dy.data<T>(),
                                   .grad_output_stride = dy.row_stride,
                                   .output = y ? y->data<T>() : nullptr,
                                   .output_stride = y ? y->row_stride : 0,
                                   .input = view(x),
                                   .weight = view(w),
                                   .grad_input = out(gradients.input),
                                   .grad_weight = out(gradients.weight),
                                   .grad_bias = out(gradients.bias)},
                                  threads());
  });
  return {gradients.input, gradients.weight, gradients.bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ext, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace mnist_ext::ops
