// The Python module mnist_ext._cuda. Importing it registers the CUDA kernels of torch.ops.mnist_ext.
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "device.h"
#include "ops.h"

namespace mnist_ext::ops {

struct OnDeviceOf::Guard {
  int32_t index;
  torch::stable::accelerator::DeviceGuard guard;

  explicit Guard(int32_t device) : index(device), guard(device) {}
};

OnDeviceOf::OnDeviceOf(const Tensor& t) : guard_(std::make_unique<Guard>(t.get_device_index())) {}
OnDeviceOf::~OnDeviceOf() = default;

CUstream_st* OnDeviceOf::stream() const {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(guard_->index, &stream));
  return static_cast<CUstream_st*>(stream);
}

STABLE_TORCH_LIBRARY_IMPL(mnist_ext, CUDA, m) { cuda::implement_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(mnist_ext, CompositeExplicitAutograd, m) { cuda::implement_ops_without_tensors(m); }

}  // namespace mnist_ext::ops

PYBIND11_MODULE(_cuda, m) {
  m.attr("architectures") = MNIST_EXT_CUDA_ARCHITECTURES;
  m.attr("toolkit") = MNIST_EXT_CUDA_TOOLKIT;
  m.def("set_train_step_graphs", &mnist_ext::ops::cuda::set_train_step_graphs, pybind11::arg("enabled") = true,
        "Choose whether TrainStep may make CUDA graphs, for tests and benchmarks.");
}
