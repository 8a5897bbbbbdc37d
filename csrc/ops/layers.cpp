// linear and mlp, and their gradients: checks, allocation, dispatch on the dtype.
#include <algorithm>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "device.h"
#include "schemas.h"

namespace mnist_ext::ops {
namespace {

constexpr const char* kLinear = "mnist_ext.linear";
constexpr const char* kLinearBackward = "mnist_ext.linear_backward";
constexpr const char* kMlp = "mnist_ext.mlp";
constexpr const char* kMlpBackward = "mnist_ext.mlp_backward";

// All of shape [..., columns] with the same leading dimensions.
bool same_leading_dimensions(const Tensor& a, const Tensor& b) {
  return a.dim() == b.dim() && std::equal(a.sizes().begin(), a.sizes().end() - 1, b.sizes().begin());
}

// An uninitialized tensor [..., columns] with the leading dimensions, dtype and device of t.
Tensor empty_with_columns(const Tensor& t, int64_t columns) {
  int64_t sizes[kMaxDims];
  const int64_t dims = t.dim();
  for (int64_t i = 0; i < dims - 1; ++i) sizes[i] = t.size(i);
  sizes[dims - 1] = columns;
  return empty(t, dtype_of(t), sizes, dims);
}

// Of input and weight.
Matrix as_factor(const Tensor& t) { return as_matrix(t, Strides::one_of_them_1); }

// Of grad_output and ReLU's output: on the CPU their rows are contiguous.
Matrix as_gradient(const Tensor& t) { return as_matrix(t, Strides::row_major); }

struct LayerOperands {
  Matrix weight;               // [out_features, in_features]
  std::optional<Tensor> bias;  // contiguous
  bool relu, allow_tf32;

  LayerOperands(const Tensor& w, const Tensor* b, bool with_relu, bool with_tf32)
      : weight(as_factor(w)),
        relu(with_relu),
        allow_tf32(with_tf32) {
    if (b) bias = made_contiguous(*b);
  }

  int64_t in_features() const { return weight.columns; }
  int64_t out_features() const { return weight.rows; }

  template <class T>
  Layer<T> on(int64_t batch, MatrixView<T> input, T* out) const {
    return {.batch = batch,
            .in_features = in_features(),
            .out_features = out_features(),
            .input = input,
            .weight = weight.view<T>(),
            .bias = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr,
            .relu = relu,
            .allow_tf32 = allow_tf32,
            .out = out};
  }
};

template <class T>
void run(std::span<const Entry<T>> entries, OnDevice& device) {
  if (entries.empty()) return;
  const Program<T> program = {entries.data(), static_cast<int64_t>(entries.size()), kProductGrain};
  void* workspace = device.workspace(kernels<T>().workspace_bytes(program));
  kernels<T>().run(program, workspace, device.launch());
}

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
  check_operand(kLinear, "bias", *bias, "input", input, bias->dim() == 1 && bias->size(0) == weight.size(0), "shape [",
                weight.size(0), "] for weight ", Shape(weight));
}

// What linear_backward returns: undefined where not wanted.
struct LinearGradients {
  int64_t in_features = 0, out_features;
  Tensor input, weight, bias;

  // Checks the arguments.
  LinearGradients(const Tensor& grad_output, const std::optional<Tensor>& x, const std::optional<Tensor>& w,
                  const std::optional<Tensor>& output, bool need_bias) {
    check_floating(kLinearBackward, "grad_output", grad_output);
    const int64_t dims = grad_output.dim();
    check(1 <= dims && dims <= kMaxDims, kLinearBackward, ": grad_output: expected 1 to ", kMaxDims,
          " dimensions, got ", dims);
    out_features = grad_output.size(dims - 1);
    if (w) {
      check_operand(kLinearBackward, "weight", *w, "grad_output", grad_output,
                    w->dim() == 2 && w->size(0) == out_features, "shape [", out_features,
                    ", in_features] for grad_output ", Shape(grad_output));
      in_features = w->size(1);
    }
    if (x) {
      check_operand(kLinearBackward, "input", *x, "grad_output", grad_output, same_leading_dimensions(*x, grad_output),
                    "the leading dimensions of grad_output ", Shape(grad_output));
      if (w) {
        check(x->size(dims - 1) == in_features, kLinearBackward,
              ": input: expected its last dimension to be in_features = ", in_features, " of weight ", Shape(*w),
              ", got shape ", Shape(*x));
      }
      in_features = x->size(dims - 1);
    }
    if (output) {
      check_operand(kLinearBackward, "output", *output, "grad_output", grad_output, same_sizes(*output, grad_output),
                    "the shape of grad_output, ", Shape(grad_output));
    }
    if (w) input = empty_with_columns(grad_output, in_features);
    if (x) weight = empty(grad_output, {out_features, in_features});
    if (need_bias) bias = empty(grad_output, {out_features});
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
    run<T>({&entry, 1}, device);
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
    std::size_t count = 0;
    if (weight) entries[count++] = {grad_input_product(layer)};
    if (input || need_bias) entries[count++] = {grad_weight_product(layer)};
    run<T>({entries, count}, device);
  });
  return {gradients.input, gradients.weight, gradients.bias};
}

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

// Columns of the outputs of all layers but the last.
struct HiddenFeatures {
  int64_t all = 0, widest = 0;

  explicit HiddenFeatures(const Layers& layers) {
    for (std::size_t l = 0; l + 1 < layers.size(); ++l) {
      all += layers[l].out_features();
      widest = std::max(widest, layers[l].out_features());
    }
  }
};

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
  const HiddenFeatures features(layers);
  const int64_t buffer_size = x.rows * features.widest;
  const Tensor hidden = empty(input, {keep_hidden ? x.rows * features.all : 2 * buffer_size});
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
    run<T>(program, device);
  });
  return {output, keep_hidden ? hidden : empty(input, {0})};
}

std::vector<Tensor> mlp_backward(const Tensor& grad_output, const Tensor& input, const Tensor& hidden,
                                 const std::optional<Tensor>& output, const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& biases, const std::vector<int64_t>& flags, bool need_input,
                                 bool allow_tf32) {
  const auto taken = layers_of(kMlpBackward, input, weights, biases, flags, allow_tf32);
  check(taken.has_value(), kMlpBackward, ": input, weights, biases: expected what mlp takes");
  const Layers& layers = *taken;
  OnDevice device(input);
  const Matrix x = as_factor(input);
  const int64_t classes = layers.back().out_features();
  const auto check_output = [&](const char* name, const Tensor& t) {
    check_operand(kMlpBackward, name, t, "input", input,
                  same_leading_dimensions(t, input) && t.size(t.dim() - 1) == classes, "the shape of input ",
                  Shape(input), " with ", classes, " columns");
  };
  check_output("grad_output", grad_output);
  const Matrix dy = as_gradient(grad_output);
  check(output.has_value() == layers.back().relu, kMlpBackward,
        ": output: expected it where the last layer has a ReLU");
  std::optional<Matrix> y;
  if (output) {
    check_output("output", *output);
    y = as_gradient(*output);
  }
  const int64_t numbers = x.rows * HiddenFeatures(layers).all;
  check_operand(kMlpBackward, "hidden", hidden, "input", input,
                hidden.dim() == 1 && hidden.size(0) == numbers && hidden.is_contiguous(), "the ", numbers,
                " numbers that mlp returned");

  std::vector<Tensor> gradients;
  if (need_input) gradients.push_back(empty_with_columns(grad_output, x.columns));
  for (const LayerOperands& layer : layers) {
    gradients.push_back(empty(input, {layer.out_features(), layer.in_features()}));
  }
  for (const Tensor& bias : biases) gradients.push_back(empty(input, {bias.size(0)}));
  const Tensor grad_hidden = empty(input, {hidden.numel()});

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
    run<T>(program, device);
  });
  return gradients;
}

std::tuple<Tensor, Tensor> not_taken(const Tensor&, const std::vector<Tensor>&, const std::vector<Tensor>&,
                                     const std::vector<int64_t>&, bool, bool) {
  return {};
}

}  // namespace

void implement_layers(Library& m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
  m.impl("mlp", TORCH_BOX(&mlp));
  m.impl("mlp_backward", TORCH_BOX(&mlp_backward));
}

void implement_mlp_of_other_tensors(Library& m) { m.impl("mlp", TORCH_BOX(&not_taken)); }

}  // namespace mnist_ext::ops
