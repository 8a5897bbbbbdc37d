// The CUDA ops on the emulator: torch.ops.mnist_ext_emulated.*, for CPU tensors.
#include <torch/csrc/stable/library.h>

#include "../../csrc/ops/cuda/device.h"
#include "../../csrc/ops/cuda/ops.h"
#include "../../csrc/ops/schemas.h"

namespace mnist_ext::ops {

struct OnDeviceOf::Guard {};

OnDeviceOf::OnDeviceOf(const Tensor&) {}
OnDeviceOf::~OnDeviceOf() = default;

CUstream_st* OnDeviceOf::stream() const { return nullptr; }

STABLE_TORCH_LIBRARY(mnist_ext_emulated, m) { define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(mnist_ext_emulated, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&cuda::cross_entropy));
  m.impl("cross_entropy_with_gradient", TORCH_BOX(&cuda::cross_entropy_with_gradient));
  m.impl("cross_entropy_gradient_", TORCH_BOX(&cuda::cross_entropy_gradient_));
  m.impl("cross_entropy_backward", TORCH_BOX(&cuda::cross_entropy_backward));
  m.impl("sgd_step", TORCH_BOX(&cuda::sgd_step));
}

}  // namespace mnist_ext::ops
