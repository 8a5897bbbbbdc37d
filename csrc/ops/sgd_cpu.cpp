// sgd_step on the CPU.
#include <torch/csrc/stable/library.h>

#include "sgd_operands.h"

namespace mnist_ext::ops {
namespace {

int64_t sgd_step(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                 const std::vector<Tensor>& momentum_buffers, double lr, double momentum, double dampening,
                 double weight_decay, bool nesterov, bool maximize, bool first_step) {
  const SgdOptions options = {lr, momentum, dampening, weight_decay, nesterov, maximize, first_step};
  return sgd_step_by_dtype(params, grads, momentum_buffers, [&](const auto& tensors) {
    mnist_ext::sgd_step(tensors.data(), static_cast<int64_t>(tensors.size()), options, threads());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ext, CPU, m) { m.impl("sgd_step", TORCH_BOX(&sgd_step)); }

}  // namespace mnist_ext::ops
