// The CUDA ops on the emulator: torch.ops.mnist_ext_emulated.*, for CPU tensors.
#include "../../csrc/ops/cuda/device.h"
#include "../../csrc/ops/cuda/ops.h"
#include "../../csrc/ops/schemas.h"

namespace mnist_ext::ops {

struct OnDeviceOf::Guard {};

OnDeviceOf::OnDeviceOf(const Tensor&) {}
OnDeviceOf::~OnDeviceOf() = default;

CUstream_st* OnDeviceOf::stream() const { return nullptr; }

STABLE_TORCH_LIBRARY(mnist_ext_emulated, m) { define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(mnist_ext_emulated, CPU, m) { cuda::implement_ops(m); }

}  // namespace mnist_ext::ops
