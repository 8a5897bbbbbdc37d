// A linear layer as products, and several layers as a program. The ops linear and mlp, and training steps, on each
// device, are made of these.
#pragma once

#include <span>
#include <vector>

#include "../api/program.h"

namespace mnist_ext {

template <class T>
struct MatrixView {
  const T* data = nullptr;  // element (row, column) is data[row * row_stride + column * column_stride]
  int64_t row_stride = 0, column_stride = 0;

  Operand<T> over_columns() const { return {data, row_stride, column_stride}; }  // K runs along a row
  Operand<T> over_rows() const { return {data, column_stride, row_stride}; }     // K runs down a column
};

// out = activation(input * weight^T + bias)
template <class T>
struct Layer {
  int64_t batch, in_features, out_features;
  MatrixView<T> input;   // [batch, in_features]
  MatrixView<T> weight;  // [out_features, in_features]
  const T* bias;         // [out_features], or null
  bool relu, allow_tf32;
  T* out;                         // [batch, out_features], contiguous
  MatrixView<T> grad_output{};    // [batch, out_features]
  MatrixView<T> output{};         // of ReLU, where grad_output is not yet 0 where that was <= 0; or null data
  const T* input_mask = nullptr;  // where input is ReLU's output: that again, contiguous, the mask of grad_input
  T* grad_input = nullptr;        // [batch, in_features], contiguous, or null: not wanted
  T* grad_weight = nullptr;       // [out_features, in_features], contiguous, or null
  T* grad_bias = nullptr;         // [out_features], or null
  ParameterUpdate<T> update_weight{}, update_bias{};
};

template <class T>
Product<T> forward_product(const Layer<T>& layer) {
  return {.M = layer.batch,
          .N = layer.out_features,
          .K = layer.in_features,
          .a = layer.input.over_columns(),
          .b = layer.weight.over_columns(),
          .bias = layer.bias,
          .relu = layer.relu,
          .allow_tf32 = layer.allow_tf32,
          .c = layer.out};
}

// With dy = grad_output, 0 where ReLU's output was <= 0: dy * weight, behind the mask of the layer before.
template <class T>
Product<T> grad_input_product(const Layer<T>& layer) {
  return {.M = layer.batch,
          .N = layer.in_features,
          .K = layer.out_features,
          .a = layer.grad_output.over_columns(),
          .relu_mask = layer.output.over_columns(),
          .b = layer.weight.over_rows(),
          .allow_tf32 = layer.allow_tf32,
          .c_mask = layer.input_mask,
          .c = layer.grad_input};
}

// dy^T * input, and the column sums of dy.
template <class T>
Product<T> grad_weight_product(const Layer<T>& layer) {
  return {.M = layer.out_features,
          .N = layer.in_features,
          .K = layer.batch,
          .a = layer.grad_output.over_rows(),
          .relu_mask = layer.output.over_rows(),
          .b = layer.input.over_rows(),
          .allow_tf32 = layer.allow_tf32,
          .c = layer.grad_weight,
          .row_sums = layer.grad_bias,
          .update = layer.update_weight,
          .row_sums_update = layer.update_bias};
}

// Each layer reads what the one before it has written.
template <class T>
void append_forward(std::span<const Layer<T>> layers, Sharing sharing, std::vector<Entry<T>>& program) {
  program.reserve(program.size() + layers.size());
  for (const Layer<T>& layer : layers) {
    const bool waits = !program.empty();
    program.push_back({forward_product(layer), waits, sharing});
  }
}

// From the last layer to the first: the gradients of inputs that are wanted, each the grad_output of the layer before;
// then those of weights and biases, which nothing waits for.
template <class T>
void append_backward(std::span<const Layer<T>> layers, Sharing sharing, std::vector<Entry<T>>& program) {
  program.reserve(program.size() + 2 * layers.size());
  bool updates = false;
  for (auto layer = layers.rbegin(); layer != layers.rend(); ++layer) {
    const bool waits = !program.empty();
    if (layer->grad_input) program.push_back({grad_input_product(*layer), waits, sharing});
    updates = updates || layer->update_weight.param || layer->update_bias.param;
  }
  // Where the first layer's grad_input is the last entry, all that is read here was written before that one.
  bool waits = !program.empty() && (updates || !layers.front().grad_input);
  for (const Layer<T>& layer : layers) {
    const Product<T> product = grad_weight_product(layer);
    if (!product.forms_c() && !product.forms_row_sums()) continue;
    program.push_back({product, waits, sharing});
    waits = false;
  }
}

}  // namespace mnist_ext
