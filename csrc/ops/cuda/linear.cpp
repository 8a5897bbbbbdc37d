// linear and linear_backward on CUDA: checks, allocation, dispatch on the dtype. Nothing here waits for the device.
#include "../../kernels/cuda/linear.h"

#include "../linear_operands.h"
#include "device.h"
#include "ops.h"

namespace mnist_ext::ops::cuda {
namespace {

using mnist_ext::cuda::Operand;
using mnist_ext::cuda::Precision;
using mnist_ext::cuda::Product;

constexpr const char* kLinear = "mnist_ext.linear";
constexpr const char* kBackward = "mnist_ext.linear_backward";

// A tensor [..., columns] as a matrix [rows, columns] with one stride for each.
struct StridedMatrix {
  Tensor tensor;  // the tensor itself, or a contiguous copy where its leading dimensions have no common stride
  int64_t rows = 1, columns, row_stride, column_stride;

  explicit StridedMatrix(const Tensor& t) : tensor(t) {
    const int64_t dims = t.dim();
    for (int64_t i = 0; i < dims - 1; ++i) rows *= t.size(i);
    columns = t.size(dims - 1);
    const std::optional<int64_t> stride = merged_stride(t, 0, dims - 1);
    if (!stride && rows > 0) tensor = torch::stable::contiguous(t);
    row_stride = stride.value_or(columns);
    column_stride = tensor.stride(dims - 1);
  }

  template <class T>
  Operand<T> by_rows() const {  // the columns are summed over
    return {static_cast<const T*>(tensor.const_data_ptr()), row_stride, column_stride};
  }
  template <class T>
  Operand<T> by_columns() const {  // the rows are summed over
    return {static_cast<const T*>(tensor.const_data_ptr()), column_stride, row_stride};
  }
};

template <class T>
void run(const Product<T>& product, Precision precision, const Tensor& on_device_of, const OnDeviceOf& device) {
  const int64_t bytes = mnist_ext::cuda::product_workspace_bytes(product, precision);
  Tensor workspace;
  if (bytes > 0) workspace = empty(device_of(on_device_of), aoti_torch_dtype_uint8(), {bytes});
  mnist_ext::cuda::product(product, precision, bytes > 0 ? workspace.mutable_data_ptr() : nullptr, device.stream());
}

Precision precision_of(bool allow_tf32) { return allow_tf32 ? Precision::tf32 : Precision::full; }

}  // namespace

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, bool relu,
              bool allow_tf32) {
  check_linear(kLinear, input, weight, bias);
  const OnDeviceOf device(input);
  const int64_t out_features = weight.size(0);
  const Tensor out = empty_with_columns(input, out_features);
  const StridedMatrix x(input), w(weight);
  std::optional<Tensor> b;
  if (bias) b = torch::stable::contiguous(*bias);
  dispatch_floating(input, [&](auto zero) {
    using T = decltype(zero);
    const Product<T> product = {.rows = x.rows,
                                .columns = out_features,
                                .depth = x.columns,
                                .a = x.by_rows<T>(),
                                .gate = {},
                                .b = w.by_rows<T>(),
                                .bias = b ? static_cast<const T*>(b->const_data_ptr()) : nullptr,
                                .relu = relu,
                                .out = static_cast<T*>(out.mutable_data_ptr()),
                                .row_sums = nullptr};
    run(product, precision_of(allow_tf32), input, device);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad_output, const std::optional<Tensor>& input,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& output, bool need_bias,
                                                   bool allow_tf32) {
  check_floating(kBackward, "grad_output", grad_output);
  const OnDeviceOf device(grad_output);
  const LinearGradients gradients(kBackward, grad_output, input, weight, output, need_bias);
  const StridedMatrix dy(grad_output);
  const auto matrix = [](const std::optional<Tensor>& t) {
    return t ? std::optional<StridedMatrix>(*t) : std::nullopt;
  };
  const std::optional<StridedMatrix> x = matrix(input), w = matrix(weight), y = matrix(output);
  dispatch_floating(grad_output, [&](auto zero) {
    using T = decltype(zero);
    const auto out = [](const Tensor& t) { return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr; };
    const Precision precision = precision_of(allow_tf32);
    if (w) {
      const Product<T> product = {.rows = dy.rows,
                                  .columns = gradients.in_features,
                                  .depth = gradients.out_features,
                                  .a = dy.by_rows<T>(),
                                  .gate = y ? y->template by_rows<T>() : Operand<T>{},
                                  .b = w->template by_columns<T>(),
                                  .bias = nullptr,
                                  .relu = false,
                                  .out = out(gradients.input),
                                  .row_sums = nullptr};
      run(product, precision, grad_output, device);
    }
    if (x || need_bias) {
      const Product<T> product = {.rows = gradients.out_features,
                                  .columns = x ? gradients.in_features : 0,
                                  .depth = dy.rows,
                                  .a = dy.by_columns<T>(),
                                  .gate = y ? y->template by_columns<T>() : Operand<T>{},
                                  .b = x ? x->template by_columns<T>() : Operand<T>{},
                                  .bias = nullptr,
                                  .relu = false,
                                  .out = out(gradients.weight),
                                  .row_sums = out(gradients.bias)};
      run(product, precision, grad_output, device);
    }
  });
  return {gradients.input, gradients.weight, gradients.bias};
}

}  // namespace mnist_ext::ops::cuda
