// mlp and mlp_backward on the CPU: checks, allocation, dispatch on the dtype.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "../kernels/mlp.h"
#include "layers.h"
#include "linear_operands.h"

namespace mnist_ext::ops {
namespace {

constexpr const char* kMlp = "mnist_ext.mlp";
constexpr const char* kBackward = "mnist_ext.mlp_backward";

struct Layer {
  Matrix weight;               // [out_features, in_features]
  std::optional<Tensor> bias;  // contiguous
  bool relu;

  int64_t in_features() const { return weight.columns; }
  int64_t out_features() const { return weight.rows; }
};

// The layers, each of which takes what the one before it returns.
std::vector<Layer> layers_of(const char* op, const Tensor& input, const std::vector<Tensor>& params,
                             const std::vector<int64_t>& flags) {
  check(!flags.empty(), op, ": layers: expected at least one");
  check(input.scalar_type() == ScalarType::Float || input.scalar_type() == ScalarType::Double, op,
        ": input: expected float32 or float64, got ", DtypeName(input));
  check(1 <= input.dim() && input.dim() <= kMaxDims, op, ": input: expected 1 to ", kMaxDims, " dimensions, got ",
        input.dim());
  std::vector<Layer> layers;
  int64_t features = input.size(input.dim() - 1);
  std::size_t next = 0;
  for (const int64_t flag : flags) {
    const bool has_bias = flag & kBias;
    check(next + (has_bias ? 2 : 1) <= params.size(), op, ": params: expected a weight for each of ", flags.size(),
          " layers and a bias where it has one, got ", params.size());
    const Tensor& weight = params[next];
    check_like(op, "params", weight, "input", input);
    check(weight.dim() == 2 && weight.size(1) == features, op, ": params[", next,
          "]: expected a weight [out_features, ", features, "], got ", Shape(weight));
    features = weight.size(0);
    ++next;
    Layer layer = {as_matrix(weight, true), std::nullopt, (flag & kRelu) != 0};
    if (has_bias) {
      const Tensor& bias = params[next];
      check_like(op, "params", bias, "input", input);
      check(bias.dim() == 1 && bias.size(0) == features, op, ": params[", next, "]: expected a bias [", features,
            "], got ", Shape(bias));
      layer.bias = made_contiguous(bias);
      ++next;
    }
    layers.push_back(std::move(layer));
  }
  check(next == params.size(), op, ": params: expected ", next, " for these layers, got ", params.size());
  return layers;
}

// The outputs of all layers but the last, [rows, out_features] each, one after the other in one tensor.
int64_t hidden_size(const std::vector<Layer>& layers, int64_t rows) {
  int64_t features = 0;
  for (std::size_t l = 0; l + 1 < layers.size(); ++l) features += layers[l].out_features();
  return rows * features;
}

// Calls run with an element of the dtype.
template <class Run>
void by_dtype(const Tensor& t, const Run& run) {
  t.scalar_type() == ScalarType::Float ? run(float{}) : run(double{});
}

std::tuple<Tensor, Tensor> mlp(const Tensor& input, const std::vector<Tensor>& params,
                               const std::vector<int64_t>& flags) {
  const std::vector<Layer> layers = layers_of(kMlp, input, params, flags);
  const Matrix x = as_matrix(input, true);
  const Tensor output = empty_with_columns(input, layers.back().out_features());
  const Tensor hidden = empty(dtype_of(input), {hidden_size(layers, x.rows)});
  by_dtype(input, [&](auto zero) {
    using T = decltype(zero);
    std::vector<LinearForward<T>> forward;
    MatrixView<T> from = view_of<T>(x);
    T* to = static_cast<T*>(hidden.mutable_data_ptr());
    for (const Layer& layer : layers) {
      if (&layer == &layers.back()) to = static_cast<T*>(output.mutable_data_ptr());
      forward.push_back({.rows = x.rows,
                         .in_features = layer.in_features(),
                         .out_features = layer.out_features(),
                         .input = from,
                         .weight = view_of<T>(layer.weight),
                         .bias = layer.bias ? static_cast<const T*>(layer.bias->const_data_ptr()) : nullptr,
                         .activation = layer.relu ? Activation::relu : Activation::none,
                         .out = to});
      from = {to, layer.out_features(), 1};
      to += x.rows * layer.out_features();
    }
    mlp_forward<T>(forward.data(), static_cast<int64_t>(forward.size()), threads());
  });
  return {output, hidden};
}

std::vector<Tensor> mlp_backward(const Tensor& grad_output, const Tensor& input, const Tensor& hidden,
                                 const std::optional<Tensor>& output, const std::vector<Tensor>& params,
                                 const std::vector<int64_t>& flags, bool need_input) {
  const std::vector<Layer> layers = layers_of(kBackward, input, params, flags);
  const Matrix x = as_matrix(input, true);
  const int64_t classes = layers.back().out_features();
  const auto check_output = [&](const char* name, const Tensor& t) {
    check_like(kBackward, name, t, "input", input);
    check(same_leading_dimensions(t, input) && t.size(t.dim() - 1) == classes, kBackward, ": ", name,
          ": expected the shape of input ", Shape(input), " with ", classes, " columns, got ", Shape(t));
  };
  check_output("grad_output", grad_output);
  const Matrix dy = as_matrix(grad_output);
  check(output.has_value() == layers.back().relu, kBackward, ": output: expected it where the last layer has a ReLU");
  std::optional<Matrix> y;
  if (output) {
    check_output("output", *output);
    y = as_matrix(*output);
  }
  check_like(kBackward, "hidden", hidden, "input", input);
  check(hidden.dim() == 1 && hidden.size(0) == hidden_size(layers, x.rows) && hidden.is_contiguous(), kBackward,
        ": hidden: expected the ", hidden_size(layers, x.rows), " numbers that mlp returned, got ", Shape(hidden));

  const int32_t dtype = dtype_of(input);
  std::vector<Tensor> gradients;
  if (need_input) gradients.push_back(empty_with_columns(grad_output, x.columns));
  for (const Layer& layer : layers) {
    gradients.push_back(empty(dtype, {layer.out_features(), layer.in_features()}));
    if (layer.bias) gradients.push_back(empty(dtype, {layer.out_features()}));
  }
  const Tensor grad_hidden = empty(dtype, {hidden.numel()});

  by_dtype(input, [&](auto zero) {
    using T = decltype(zero);
    const auto data = [](const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
    std::vector<LinearBackward<T>> backward;
    auto gradient = gradients.begin();
    T* grad_input = need_input ? data(*gradient++) : nullptr;
    MatrixView<T> from = view_of<T>(x);
    int64_t offset = 0;
    for (const Layer& layer : layers) {
      const bool is_last = &layer == &layers.back();
      T* grad_weight = data(*gradient++);
      T* grad_bias = layer.bias ? data(*gradient++) : nullptr;
      T* grad_outputs = data(grad_hidden) + offset;
      const T* outputs = data(hidden) + offset;
      backward.push_back({.rows = x.rows,
                          .in_features = layer.in_features(),
                          .out_features = layer.out_features(),
                          .grad_output = is_last ? dy.data<T>() : grad_outputs,
                          .grad_output_stride = is_last ? dy.row_stride : layer.out_features(),
                          .output = !layer.relu ? nullptr
                                    : is_last   ? y->data<T>()
                                                : outputs,
                          .output_stride = is_last && y ? y->row_stride : layer.out_features(),
                          .input = from,
                          .weight = view_of<T>(layer.weight),
                          .grad_input = grad_input,
                          .grad_weight = grad_weight,
                          .grad_bias = grad_bias});
      grad_input = grad_outputs;
      from = {outputs, layer.out_features(), 1};
      offset += x.rows * layer.out_features();
    }
    mnist_ext::mlp_backward<T>(backward.data(), static_cast<int64_t>(backward.size()), threads());
  });
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ext, CPU, m) {
  m.impl("mlp", TORCH_BOX(&mlp));
  m.impl("mlp_backward", TORCH_BOX(&mlp_backward));
}

}  // namespace mnist_ext::ops
