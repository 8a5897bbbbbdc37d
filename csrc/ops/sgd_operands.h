// The arguments of sgd_step, whatever the device: checked, and in the kernels' terms.
#pragma once

#include <vector>

#include "../kernels/sgd.h"
#include "tensors.h"

namespace mnist_ext::ops {

// Whether the elements fill one piece of memory, each place once: in some order of the dimensions, each stride is the
// number of elements in those before it.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  int64_t expected = 1;
  for (int64_t placed = 0; placed < t.dim();) {
    int64_t next = -1;
    for (int64_t i = 0; i < t.dim(); ++i) {
      if (sizes[i] != 1 && strides[i] == expected) next = i;
    }
    if (next == -1) break;
    expected *= sizes[next];
    ++placed;
  }
  return expected == t.numel();
}

inline bool have_same_layout(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim() || a.scalar_type() != b.scalar_type() || !on_same_device(a, b)) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i) || (a.size(i) != 1 && a.stride(i) != b.stride(i))) return false;
  }
  return true;
}

// Calls step(tensors) for each dtype among params. Returns what the op does.
template <class Step>
int64_t sgd_step_by_dtype(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                          const std::vector<Tensor>& momentum_buffers, const Step& step) {
  constexpr const char* kSgd = "mnist_ext.sgd_step";
  const std::size_t count = params.size();
  check(grads.size() == count, kSgd, ": grads: expected one for each of ", count, " params, got ", grads.size());
  check(momentum_buffers.empty() || momentum_buffers.size() == count, kSgd, ": momentum_buffers: expected none or ",
        count, ", one for each of params, got ", momentum_buffers.size());
  for (std::size_t i = 0; i < count; ++i) {
    const bool fitting = on_same_device(params[i], params[0]) && is_floating(params[i]) && is_dense(params[i]) &&
                         have_same_layout(params[i], grads[i]) &&
                         (momentum_buffers.empty() || have_same_layout(params[i], momentum_buffers[i]));
    if (!fitting) return static_cast<int64_t>(i);
  }
  const auto step_of = [&](ScalarType dtype, auto zero) {
    using T = decltype(zero);
    std::vector<SgdTensor<T>> tensors;
    for (std::size_t i = 0; i < count; ++i) {
      if (params[i].scalar_type() != dtype) continue;
      T* buffer = momentum_buffers.empty() ? nullptr : static_cast<T*>(momentum_buffers[i].mutable_data_ptr());
      tensors.push_back({params[i].numel(), static_cast<T*>(params[i].mutable_data_ptr()),
                         static_cast<const T*>(grads[i].const_data_ptr()), buffer});
    }
    if (!tensors.empty()) step(tensors);
  };
  step_of(ScalarType::Float, float{});
  step_of(ScalarType::Double, double{});
  step_of(ScalarType::BFloat16, BFloat16{});
  step_of(ScalarType::Half, Float16{});
  return -1;
}

}  // namespace mnist_ext::ops
