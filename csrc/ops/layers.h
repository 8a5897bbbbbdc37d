// The arguments of linear and linear_backward, whatever the device: checked, and with their results allocated.
#pragma once

#include <optional>

#include "../kernels/linear.h"
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
template <class T>
MatrixView<T> view_of(const Matrix& m) {
  return {m.data<T>(), m.row_stride, m.column_stride};
}

inline void check_linear(const char* op, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_floating(op, "input", input);
  check_like(op, "weight", weight, "input", input);
  check(1 <= input.dim() && input.dim() <= kMaxDims, op, ": input: expected 1 to ", kMaxDims, " dimensions, got ",
        input.dim());
  check(weight.dim() == 2, op, ": weight: expected 2 dimensions [out_features, in_features], got shape ",
        Shape(weight));
  check(input.size(input.dim() - 1) == weight.size(1), op,
        ": input: expected its last dimension to be in_features = ", weight.size(1), " of weight ", Shape(weight),
        ", got shape ", Shape(input));
  if (!bias) return;
  check_like(op, "bias", *bias, "input", input);
  check(bias->dim() == 1 && bias->size(0) == weight.size(0), op, ": bias: expected shape [", weight.size(0),
        "] for weight ", Shape(weight), ", got ", Shape(*bias));
}

// What linear_backward returns: undefined where not wanted.
struct LinearGradients {
  int64_t in_features = 0, out_features;
  Tensor input, weight, bias;

  // Checks the arguments.
  LinearGradients(const char* op, const Tensor& grad_output, const std::optional<Tensor>& x,
                  const std::optional<Tensor>& w, const std::optional<Tensor>& output, bool need_bias) {
    check_floating(op, "grad_output", grad_output);
    const int64_t dims = grad_output.dim();
    check(1 <= dims && dims <= kMaxDims, op, ": grad_output: expected 1 to ", kMaxDims, " dimensions, got ", dims);
    out_features = grad_output.size(dims - 1);
    if (w) {
      check_like(op, "weight", *w, "grad_output", grad_output);
      check(w->dim() == 2 && w->size(0) == out_features, op, ": weight: expected shape [", out_features,
            ", in_features] for grad_output ", Shape(grad_output), ", got ", Shape(*w));
      in_features = w->size(1);
    }
    if (x) {
      check_like(op, "input", *x, "grad_output", grad_output);
      check(same_leading_dimensions(*x, grad_output), op, ": input: expected the leading dimensions of grad_output ",
            Shape(grad_output), ", got ", Shape(*x));
      if (w) {
        check(x->size(dims - 1) == in_features, op,
              ": input: expected its last dimension to be in_features = ", in_features, " of weight ", Shape(*w),
              ", got shape ", Shape(*x));
      }
      in_features = x->size(dims - 1);
    }
    if (output) {
      check_like(op, "output", *output, "grad_output", grad_output);
      check(same_leading_dimensions(*output, grad_output) && output->size(dims - 1) == out_features, op,
            ": output: expected the shape of grad_output, ", Shape(grad_output), ", got ", Shape(*output));
    }
    const Device device = device_of(grad_output);
    if (w) input = empty_with_columns(grad_output, in_features);
    if (x) weight = empty(device, dtype_of(grad_output), {out_features, in_features});
    if (need_bias) bias = empty(device, dtype_of(grad_output), {out_features});
  }
};

}  // namespace mnist_ext::ops
