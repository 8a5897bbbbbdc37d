// mlp and mlp_backward: checks, allocation, dispatch on the dtype.
#include <algorithm>
#include <tuple>
#include <vector>

#include "layers.h"
#include "schemas.h"

namespace mnist_ext::ops {
namespace {

constexpr const char* kMlp = "mnist_ext.mlp";
constexpr const char* kBackward = "mnist_ext.mlp_backward";

enum LayerFlags : int64_t { kBias = 1, kRelu = 2 };  // of a layer, as the ops take it

using Layers = std::vector<LayerOperands>;

// The layers, each of which takes what the one before it returns; nothing where one of the tensors is not what the
// kernels take: `linear`, layer by layer, takes it or says what is wrong with it.
std::optional<Layers> layers_of(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                                const std::vector<Tensor>& biases, const std::vector<int64_t>& flags, bool allow_tf32) {
  check(!flags.empty(), op, ": layers: expected at least one");
  check(weights.size() == flags.size(), op, ": weights: expected one for each of ", flags.size(), " layers, got ",
        weights.size());
  const auto count = std::count_if(flags.begin(), flags.end(), [](int64_t flag) { return flag & kBias; });
  check(static_cast<int64_t>(biases.size()) == count, op, ": biases: expected ", count, " for these layers, got ",
        biases.size());
  const ScalarType dtype = input.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) return std::nullopt;
  if (input.dim() < 1 || input.dim() > kMaxDims) return std::nullopt;
  const auto fits = [&](const Tensor& t, int64_t dims) {
    return t.scalar_type() == dtype && on_same_device(t, input) && t.dim() == dims;
  };
  Layers layers;
  layers.reserve(flags.size());
  int64_t features = input.size(input.dim() - 1);
  auto bias = biases.begin();
  for (std::size_t l = 0; l < flags.size(); ++l) {
    const Tensor& weight = weights[l];
    if (!fits(weight, 2) || weight.size(1) != features) return std::nullopt;
    features = weight.size(0);
    const bool has_bias = flags[l] & kBias;
    if (has_bias && (!fits(*bias, 1) || bias->size(0) != features)) return std::nullopt;
    layers.emplace_back(weight, has_bias ? &*bias++ : nullptr, (flags[l] & kRelu) != 0, allow_tf32);
  }
  return layers;
}

// The outputs of all layers but the last, [rows, out_features] each, one after the other in one tensor.
int64_t hidden_size(const Layers& layers, int64_t rows) {
  int64_t features = 0;
  for (std::size_t l = 0; l + 1 < layers.size(); ++l) features += layers[l].out_features();
  return rows * features;
}

int64_t widest_hidden(const Layers& layers) {
  int64_t features = 0;
  for (std::size_t l = 0; l + 1 < layers.size(); ++l) features = std::max(features, layers[l].out_features());
  return features;
}

template <class T>
void run(const std::vector<Entry<T>>& program, OnDevice& device) {
  run(program.data(), static_cast<int64_t>(program.size()), device);
}

std::tuple<Tensor, Tensor> mlp(const Tensor& input, const std::vector<Tensor>& weights,
                               const std::vector<Tensor>& biases, const std::vector<int64_t>& flags, bool keep_hidden,
                               bool allow_tf32) {
  const auto taken = layers_of(kMlp, input, weights, biases, flags, allow_tf32);
  if (!taken) return {};
  const Layers& layers = *taken;
  OnDevice device(input);
  const Matrix x = as_factor(input);
  const Tensor output = empty_with_columns(input, layers.back().out_features());
  // Where nothing is kept, layers write to two buffers by turns.
  const int64_t buffer_size = keep_hidden ? 0 : x.rows * widest_hidden(layers);
  const auto new_hidden = [&](int64_t size) { return empty(device_of(input), dtype_of(input), {size}); };
  const Tensor hidden = new_hidden(keep_hidden ? hidden_size(layers, x.rows) : 2 * buffer_size);
  dispatch_float_or_double(input, [&](auto zero) {
    using T = decltype(zero);
    std::vector<Layer<T>> forward;
    forward.reserve(layers.size());
    MatrixView<T> from = x.view<T>();
    T* const hidden_data = data_of<T>(hidden);
    T* to = hidden_data;
    for (const LayerOperands& layer : layers) {
      if (&layer == &layers.back()) to = data_of<T>(output);
      forward.push_back(layer.on<T>(x.rows, from, to));
      from = {to, layer.out_features(), 1};
      to = keep_hidden ? to + x.rows * layer.out_features() : hidden_data + (to == hidden_data ? buffer_size : 0);
    }
    std::vector<Entry<T>> program;
    append_forward<T>(forward, Sharing::any, program);
    run(program, device);
  });
  return {output, keep_hidden ? hidden : new_hidden(0)};
}

std::vector<Tensor> mlp_backward(const Tensor& grad_output, const Tensor& input, const Tensor& hidden,
                                 const std::optional<Tensor>& output, const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& biases, const std::vector<int64_t>& flags, bool need_input,
                                 bool allow_tf32) {
  const auto taken = layers_of(kBackward, input, weights, biases, flags, allow_tf32);
  check(taken.has_value(), kBackward, ": input, weights, biases: expected what mlp takes");
  const Layers& layers = *taken;
  OnDevice device(input);
  const Matrix x = as_factor(input);
  const int64_t classes = layers.back().out_features();
  const auto check_output = [&](const char* name, const Tensor& t) {
    check_like(kBackward, name, t, "input", input);
    check(same_leading_dimensions(t, input) && t.size(t.dim() - 1) == classes, kBackward, ": ", name,
          ": expected the shape of input ", Shape(input), " with ", classes, " columns, got ", Shape(t));
  };
  check_output("grad_output", grad_output);
  const Matrix dy = as_gradient(grad_output);
  check(output.has_value() == layers.back().relu, kBackward, ": output: expected it where the last layer has a ReLU");
  std::optional<Matrix> y;
  if (output) {
    check_output("output", *output);
    y = as_gradient(*output);
  }
  check_like(kBackward, "hidden", hidden, "input", input);
  check(hidden.dim() == 1 && hidden.size(0) == hidden_size(layers, x.rows) && hidden.is_contiguous(), kBackward,
        ": hidden: expected the ", hidden_size(layers, x.rows), " numbers that mlp returned, got ", Shape(hidden));

  const auto new_tensor = [&](std::initializer_list<int64_t> sizes) {
    return empty(device_of(input), dtype_of(input), sizes);
  };
  std::vector<Tensor> gradients;
  if (need_input) gradients.push_back(empty_with_columns(grad_output, x.columns));
  for (const LayerOperands& layer : layers) {
    gradients.push_back(new_tensor({layer.out_features(), layer.in_features()}));
  }
  for (const Tensor& bias : biases) gradients.push_back(new_tensor({bias.size(0)}));
  const Tensor grad_hidden = new_tensor({hidden.numel()});

  dispatch_float_or_double(input, [&](auto zero) {
    using T = decltype(zero);
    std::vector<Layer<T>> backward;
    backward.reserve(layers.size());
    auto weight_gradient = gradients.begin() + (need_input ? 1 : 0);
    auto bias_gradient = weight_gradient + static_cast<std::ptrdiff_t>(layers.size());
    MatrixView<T> from = x.view<T>();
    T* grad_input = need_input ? data_of<T>(gradients[0]) : nullptr;
    T* outputs = data_of<T>(hidden);
    T* grad_outputs = data_of<T>(grad_hidden);
    bool follows_relu = false;
    for (const LayerOperands& operands : layers) {
      const bool is_last = &operands == &layers.back();
      Layer<T> layer = operands.on<T>(x.rows, from, outputs);
      layer.grad_output = is_last ? dy.view<T>() : MatrixView<T>{grad_outputs, layer.out_features, 1};
      if (is_last && y) layer.output = y->template view<T>();
      layer.input_mask = follows_relu ? from.data : nullptr;
      layer.grad_input = grad_input;
      layer.grad_weight = data_of<T>(*weight_gradient++);
      if (operands.bias) layer.grad_bias = data_of<T>(*bias_gradient++);
      backward.push_back(layer);
      grad_input = grad_outputs;
      from = {outputs, layer.out_features, 1};
      follows_relu = layer.relu;
      outputs += x.rows * layer.out_features;
      grad_outputs += x.rows * layer.out_features;
    }
    std::vector<Entry<T>> program;
    append_backward<T>(backward, Sharing::any, program);
    run(program, device);
  });
  return gradients;
}

// On another device, or not dense.
std::tuple<Tensor, Tensor> not_taken(const Tensor&, const std::vector<Tensor>&, const std::vector<Tensor>&,
                                     const std::vector<int64_t>&, bool, bool) {
  return {};
}

}  // namespace

void implement_mlp(Library& m) {
  m.impl("mlp", TORCH_BOX(&mlp));
  m.impl("mlp_backward", TORCH_BOX(&mlp_backward));
}

void implement_mlp_of_other_tensors(Library& m) { m.impl("mlp", TORCH_BOX(&not_taken)); }

}  // namespace mnist_ext::ops
