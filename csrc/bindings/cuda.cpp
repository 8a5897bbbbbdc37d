// The Python module mnist_ext._cuda. Importing it registers the CUDA kernels of torch.ops.mnist_ext.
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "../ops/device.h"
#include "../ops/schemas.h"

namespace mnist_ext::ops {

struct OnDevice::State {
  Tensor tensor;
  torch::stable::accelerator::DeviceGuard guard;
  std::optional<Tensor> workspace;
};

OnDevice::OnDevice(const Tensor& t)
    : state_(new State{t, torch::stable::accelerator::DeviceGuard(t.get_device_index()), std::nullopt}) {}
OnDevice::~OnDevice() = default;

Launch OnDevice::launch() const {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(state_->tensor.get_device_index(), &stream));
  return {.stream = static_cast<CUstream_st*>(stream)};
}

void* OnDevice::workspace(int64_t bytes) {
  if (bytes == 0) return nullptr;
  return state_->workspace.emplace(empty(state_->tensor, aoti_torch_dtype_uint8(), {bytes})).mutable_data_ptr();
}

STABLE_TORCH_LIBRARY_IMPL(mnist_ext, CUDA, m) { implement_ops(m); }

}  // namespace mnist_ext::ops

PYBIND11_MODULE(_cuda, m) {
  m.attr("architectures") = MNIST_EXT_CUDA_ARCHITECTURES;
  m.attr("toolkit") = MNIST_EXT_CUDA_TOOLKIT;
}
