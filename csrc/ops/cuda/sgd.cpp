// sgd_step on CUDA.
#include "../../kernels/cuda/sgd.h"

#include "../sgd_operands.h"
#include "device.h"
#include "ops.h"

namespace mnist_ext::ops::cuda {

int64_t sgd_step(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                 const std::vector<Tensor>& momentum_buffers, double lr, double momentum, double dampening,
                 double weight_decay, bool nesterov, bool maximize, bool first_step) {
  const SgdOptions options = {lr, momentum, dampening, weight_decay, nesterov, maximize, first_step};
  return sgd_step_by_dtype(params, grads, momentum_buffers, [&](const auto& tensors) {
    const OnDeviceOf device(params[0]);
    mnist_ext::cuda::sgd_step(tensors.data(), static_cast<int64_t>(tensors.size()), options, nullptr, device.stream());
  });
}

}  // namespace mnist_ext::ops::cuda
