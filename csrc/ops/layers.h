// What linear and mlp share: the operands of a layer, and running its products.
#pragma once

#include <optional>

#include "device.h"
#include "tensors.h"

namespace mnist_ext::ops {

// All of shape [..., columns] with the same leading dimensions.
inline bool same_leading_dimensions(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t i = 0; same && i < a.dim() - 1; ++i) same = a.size(i) == b.size(i);
  return same;
}

// An uninitialized tensor [..., columns] with the leading dimensions, dtype and device of t.
inline Tensor empty_with_columns(const Tensor& t, int64_t columns) {
  int64_t sizes[kMaxDims];
  const int64_t dims = t.dim();
  for (int64_t i = 0; i < dims - 1; ++i) sizes[i] = t.size(i);
  sizes[dims - 1] = columns;
  return empty(device_of(t), dtype_of(t), sizes, dims);
}

// Of input and weight.
inline Matrix as_factor(const Tensor& t) { return as_matrix(t, Strides::one_of_them_1); }

// Of grad_output and ReLU's output: on the CPU their rows are contiguous.
inline Matrix as_gradient(const Tensor& t) { return as_matrix(t, Strides::row_major); }

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
void run(const Entry<T>* entries, int64_t count, OnDevice& device) {
  if (count == 0) return;
  constexpr double kGrain = 250e3;  // multiply-adds that are worth a thread of their own
  const Program<T> program = {entries, count, kGrain};
  void* workspace = device.workspace(kernels<T>().workspace_bytes(program));
  kernels<T>().run(program, workspace, device.launch());
}

}  // namespace mnist_ext::ops
