// mlp and mlp_backward on the CPU: checks, allocation, dispatch on the dtype.
#include <torch/csrc/stable/library.h>

#include <algorithm>
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

// The layers, each of which takes what the one before it returns; nothing where one of the tensors is not what the
// kernels take: `linear`, layer by layer, takes it or says what is wrong with it.
std::optional<std::vector<Layer>> layers_of(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                                            const std::vector<Tensor>& biases, const std::vector<int64_t>& flags) {
  check(!flags.empty(), op, ": layers: expected at least one");
  check(weights.size() == flags.size(), op, ": weights: expected one for each of ", flags.size(), " layers, got ",
        weights.size());
  const auto count = std::count_if(flags.begin(), flags.end(), [](int64_t flag) { return flag & kBias; });
  check(static_cast<int64_t>(biases.size()) == count, op, ": biases: expected ", count, " for these layers, got ",
        biases.size());
  const ScalarType dtype = input.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) return std::nullopt;
  if (input.dim() < 1 || input.dim() > kMaxDims) return std::nullopt;
  std::vector<Layer> layers;
  int64_t features = input.size(input.dim() - 1);
  auto bias = biases.begin();
  for (std::size_t l = 0; l < flags.size(); ++l) {
    const Tensor& weight = weights[l];
    if (weight.scalar_type() != dtype || weight.dim() != 2 || weight.size(1) != features) return std::nullopt;
    features = weight.size(0);
    Layer layer = {as_matrix(weight, true), std::nullopt, (flags[l] & kRelu) != 0};
    if (flags[l] & kBias) {
      if (bias->scalar_type() != dtype || bias->dim() != 1 || bias->size(0) != features) return std::nullopt;
      layer.bias = made_contiguous(*bias);
      ++bias;
    }
    layers.push_back(std::move(layer));
  }
  return layers;
}

// The outputs of all layers but the last, [rows, out_features] each, one after the other in one tensor.
int64_t hidden_size(const std::vector<Layer>& layers, int64_t rows) {
  int64_t features = 0;
  for (std::size_t l = 0; l + 1 < layers.size(); ++l) features += layers[l].out_features();
  return rows * features;
}

int64_t widest_hidden(const std::vector<Layer>& layers) {
  int64_t features = 0;
  for (std::size_t l = 0; l + 1 < layers.size(); ++l) features = std::max(features, layers[l].out_features());
  return features;
}

// Calls run with an element of the dtype.
template <class Run>
void by_dtype(const Tensor& t, const Run& run) {
  t.scalar_type() == ScalarType::Float ? run(float{}) : run(double{});
}

std::tuple<Tensor, Tensor> mlp(const Tensor& input, const std::vector<Tensor>& weights,
                               const std::vector<Tensor>& biases, const std::vector<int64_t>& flags, bool keep_hidden) {
  const auto taken = layers_of(kMlp, input, weights, biases, flags);
  if (!taken) return {};
  const std::vector<Layer>& layers = *taken;
  const Matrix x = as_matrix(input, true);
  const Tensor output = empty_with_columns(input, layers.back().out_features());
  // Where nothing is kept, layers write to two buffers by turns.
  const int64_t buffer_size = keep_hidden ? 0 : x.rows * widest_hidden(layers);
  const Tensor hidden = empty(dtype_of(input), {keep_hidden ? hidden_size(layers, x.rows) : 2 * buffer_size});
  by_dtype(input, [&](auto zero) {
    using T = decltype(zero);
    std::vector<LinearForward<T>> forward;
    MatrixView<T> from = view_of<T>(x);
    T* const hidden_data = static_cast<T*>(hidden.mutable_data_ptr());
    T* to = hidden_data;
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
      to = keep_hidden ? to + x.rows * layer.out_features() : hidden_data + (to == hidden_data ? buffer_size : 0);
    }
    mlp_forward<T>(forward.data(), static_cast<int64_t>(forward.size()), threads());
  });
  return {output, keep_hidden ? hidden : empty(dtype_of(input), {0})};
}

std::vector<Tensor> mlp_backward(const Tensor& grad_output, const Tensor& input, const Tensor& hidden,
                                 const std::optional<Tensor>& output, const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& biases, const std::vector<int64_t>& flags,
                                 bool need_input) {
  const auto taken = layers_of(kBackward, input, weights, biases, flags);
  check(taken.has_value(), kBackward, ": input, weights, biases: expected what mlp takes");
  const std::vector<Layer>& layers = *taken;
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
  for (const Layer& layer : layers) gradients.push_back(empty(dtype, {layer.out_features(), layer.in_features()}));
  for (const Tensor& bias : biases) gradients.push_back(empty(dtype, {bias.size(0)}));
  const Tensor grad_hidden = empty(dtype, {hidden.numel()});

  by_dtype(input, [&](auto zero) {
    using T = decltype(zero);
    const auto data = [](const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
    std::vector<LinearBackward<T>> backward;
    auto weight_gradient = gradients.begin() + (need_input ? 1 : 0);
    auto bias_gradient = weight_gradient + static_cast<std::ptrdiff_t>(layers.size());
    T* grad_input = need_input ? data(gradients[0]) : nullptr;
    MatrixView<T> from = view_of<T>(x);
    int64_t offset = 0;
    for (const Layer& layer : layers) {
      const bool is_last = &layer == &layers.back();
      T* grad_weight = data(*weight_gradient++);
      T* grad_bias = layer.bias ? data(*bias_gradient++) : nullptr;
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

// Of tensors that are not on the CPU, or not dense.
std::tuple<Tensor, Tensor> not_taken(const Tensor&, const std::vector<Tensor>&, const std::vector<Tensor>&,
                                     const std::vector<int64_t>&, bool) {
  return {};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ext, CPU, m) {
  m.impl("mlp", TORCH_BOX(&mlp));
  m.impl("mlp_backward", TORCH_BOX(&mlp_backward));
}

STABLE_TORCH_LIBRARY_IMPL(mnist_ext, CompositeExplicitAutograd, m) { m.impl("mlp", TORCH_BOX(&not_taken)); }

}  // namespace mnist_ext::ops
