// sgd_step: checks, and one call of the kernel for each dtype among the parameters.
#include <vector>

#include "device.h"
#include "schemas.h"

namespace mnist_ext::ops {
namespace {

constexpr const char* kSgd = "mnist_ext.sgd_step";

// Whether the elements fill one piece of memory, each place once: in some order of the dimensions, each stride is the
// number of elements in those before it.
bool is_dense(const Tensor& t) {
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

int64_t sgd_step(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                 const std::vector<Tensor>& momentum_buffers, double lr, double momentum, double dampening,
                 double weight_decay, bool nesterov, bool maximize, bool first_step) {
  const std::size_t count = params.size();
  check(grads.size() == count, kSgd, ": grads: expected one for each of ", count, " params, got ", grads.size());
  check(momentum_buffers.empty() || momentum_buffers.size() == count, kSgd, ": momentum_buffers: expected none or ",
        count, ", one for each of params, got ", momentum_buffers.size());
  struct Operands {
    ScalarType dtype;
    int64_t size;
    void* param;
    const void* grad;
    void* buffer;
  };
  std::vector<Operands> operands;
  std::vector<Extent> extents;
  operands.reserve(count);
  extents.reserve(3 * count);
  for (std::size_t i = 0; i < count; ++i) {
    const Tensor& p = params[i];
    const bool fitting = on_same_device(p, params[0]) && is_floating(p) && is_dense(p) &&
                         have_same_layout(p, grads[i]) &&
                         (momentum_buffers.empty() || have_same_layout(p, momentum_buffers[i]));
    if (!fitting) return static_cast<int64_t>(i);
    operands.push_back({p.scalar_type(), p.numel(), p.mutable_data_ptr(), grads[i].const_data_ptr(),
                        momentum_buffers.empty() ? nullptr : momentum_buffers[i].mutable_data_ptr()});
    const Operands& o = operands.back();
    const auto add = [&](const void* data, bool written) {
      const char* begin = static_cast<const char*>(data);
      if (data) extents.push_back({begin, begin + o.size * p.element_size(), static_cast<int32_t>(i), written});
    };
    add(o.param, true);
    add(o.grad, false);
    add(o.buffer, true);
  }
  if (const auto found = overlapping(extents)) return found->second.number;
  const SgdOptions options = {lr, momentum, dampening, weight_decay, nesterov, maximize, first_step};
  const auto step_of = [&](ScalarType dtype, auto zero) {
    using T = decltype(zero);
    std::vector<SgdTensor<T>> tensors;
    for (const Operands& o : operands) {
      if (o.dtype != dtype) continue;
      tensors.push_back({o.size, static_cast<T*>(o.param), static_cast<const T*>(o.grad), static_cast<T*>(o.buffer)});
    }
    if (tensors.empty()) return;
    OnDevice device(params[0]);
    kernels<T>().sgd_step(tensors.data(), static_cast<int64_t>(tensors.size()), options, device.launch());
  };
  step_of(ScalarType::Float, float{});
  step_of(ScalarType::Double, double{});
  step_of(ScalarType::BFloat16, BFloat16{});
  step_of(ScalarType::Half, Float16{});
  return -1;
}

}  // namespace

void implement_sgd_step(Library& m) { m.impl("sgd_step", TORCH_BOX(&sgd_step)); }

}  // namespace mnist_ext::ops
