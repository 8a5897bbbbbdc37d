// linear and linear_backward: checks, allocation, dispatch on the dtype.
#include <tuple>

#include "layers.h"
#include "schemas.h"

namespace mnist_ext::ops {
namespace {

constexpr const char* kLinear = "mnist_ext.linear";
constexpr const char* kBackward = "mnist_ext.linear_backward";

void check_linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_floating(kLinear, "input", input);
  check_like(kLinear, "weight", weight, "input", input);
  check(1 <= input.dim() && input.dim() <= kMaxDims, kLinear, ": input: expected 1 to ", kMaxDims, " dimensions, got ",
        input.dim());
  check(weight.dim() == 2, kLinear, ": weight: expected 2 dimensions [out_features, in_features], got shape ",
        Shape(weight));
  check(input.size(input.dim() - 1) == weight.size(1), kLinear,
        ": input: expected its last dimension to be in_features = ", weight.size(1), " of weight ", Shape(weight),
        ", got shape ", Shape(input));
  if (!bias) return;
  check_like(kLinear, "bias", *bias, "input", input);
  check(bias->dim() == 1 && bias->size(0) == weight.size(0), kLinear, ": bias: expected shape [", weight.size(0),
        "] for weight ", Shape(weight), ", got ", Shape(*bias));
}

// What linear_backward returns: undefined where not wanted.
struct LinearGradients {
  int64_t in_features = 0, out_features;
  Tensor input, weight, bias;

  // Checks the arguments.
  LinearGradients(const Tensor& grad_output, const std::optional<Tensor>& x, const std::optional<Tensor>& w,
                  const std::optional<Tensor>& output, bool need_bias) {
    check_floating(kBackward, "grad_output", grad_output);
    const int64_t dims = grad_output.dim();
    check(1 <= dims && dims <= kMaxDims, kBackward, ": grad_output: expected 1 to ", kMaxDims, " dimensions, got ",
          dims);
    out_features = grad_output.size(dims - 1);
    if (w) {
      check_like(kBackward, "weight", *w, "grad_output", grad_output);
      check(w->dim() == 2 && w->size(0) == out_features, kBackward, ": weight: expected shape [", out_features,
            ", in_features] for grad_output ", Shape(grad_output), ", got ", Shape(*w));
      in_features = w->size(1);
    }
    if (x) {
      check_like(kBackward, "input", *x, "grad_output", grad_output);
      check(same_leading_dimensions(*x, grad_output), kBackward,
            ": input: expected the leading dimensions of grad_output ", Shape(grad_output), ", got ", Shape(*x));
      if (w) {
        check(x->size(dims - 1) == in_features, kBackward,
              ": input: expected its last dimension to be in_features = ", in_features, " of weight ", Shape(*w),
              ", got shape ", Shape(*x));
      }
      in_features = x->size(dims - 1);
    }
    if (output) {
      check_like(kBackward, "output", *output, "grad_output", grad_output);
      check(same_leading_dimensions(*output, grad_output) && output->size(dims - 1) == out_features, kBackward,
            ": output: expected the shape of grad_output, ", Shape(grad_output), ", got ", Shape(*output));
    }
    const Device device = device_of(grad_output);
    if (w) input = empty_with_columns(grad_output, in_features);
    if (x) weight = empty(device, dtype_of(grad_output), {out_features, in_features});
    if (need_bias) bias = empty(device, dtype_of(grad_output), {out_features});
  }
};

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, bool relu,
              bool allow_tf32) {
  check_linear(input, weight, bias);
  OnDevice device(input);
  const Matrix x = as_factor(input);
  const LayerOperands layer(weight, bias ? &*bias : nullptr, relu, allow_tf32);
  const Tensor out = empty_with_columns(input, layer.out_features());
  dispatch_floating(input, [&](auto zero) {
    using T = decltype(zero);
    const Entry<T> entry = {forward_product(layer.on<T>(x.rows, x.view<T>(), data_of<T>(out)))};
    run(&entry, 1, device);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad_output, const std::optional<Tensor>& input,
                                                   const std::optional<Tensor>& weight,
                                                   const std::optional<Tensor>& output, bool need_bias,
                                                   bool allow_tf32) {
  const LinearGradients gradients(grad_output, input, weight, output, need_bias);
  OnDevice device(grad_output);
  const Matrix dy = as_gradient(grad_output);
  std::optional<Matrix> x, w, y;
  if (input) x = as_factor(*input);
  if (weight) w = as_factor(*weight);
  if (output) y = as_gradient(*output);
  dispatch_floating(grad_output, [&](auto zero) {
    using T = decltype(zero);
    const auto view = [](const std::optional<Matrix>& m) { return m ? m->template view<T>() : MatrixView<T>{}; };
    const Layer<T> layer = {.batch = dy.rows,
                            .in_features = gradients.in_features,
                            .out_features = gradients.out_features,
                            .input = view(x),
                            .weight = view(w),
                            .bias = nullptr,
                            .relu = y.has_value(),
                            .allow_tf32 = allow_tf32,
                            .out = nullptr,
                            .grad_output = dy.view<T>(),
                            .output = view(y),
                            .grad_input = data_of<T>(gradients.input),
                            .grad_weight = data_of<T>(gradients.weight),
                            .grad_bias = data_of<T>(gradients.bias)};
    Entry<T> entries[2];
    int64_t count = 0;
    if (weight) entries[count++] = {grad_input_product(layer)};
    if (input || need_bias) entries[count++] = {grad_weight_product(layer)};
    run(entries, count, device);
  });
  return {gradients.input, gradients.weight, gradients.bias};
}

}  // namespace

void implement_linear(Library& m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace mnist_ext::ops
