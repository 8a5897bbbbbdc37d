// train_steps on CUDA: in one cluster of blocks where it fits, else by the kernels of each op, one after the other.
// Nothing here waits for the device.
#include "../../kernels/cuda/train_step.h"

#include "../../kernels/cuda/train_step_sequence.h"
#include "../train_step_operands.h"
#include "device.h"
#include "ops.h"

namespace mnist_ext::ops::cuda {
namespace {

template <class T>
void run(const TrainStepsOperands<T>& operands, const Tensor& param) {
  const OnDeviceOf device(param);
  if constexpr (std::is_same_v<T, float>) {
    if (mnist_ext::cuda::train_steps_in_cluster(operands.steps, operands.image_count, device.stream())) return;
  }
  const int64_t bytes = mnist_ext::cuda::train_steps_sequence_workspace_bytes(operands.steps);
  const Tensor workspace = empty(device_of(param), aoti_torch_dtype_uint8(), {bytes});
  mnist_ext::cuda::train_steps_in_sequence(operands.steps, operands.image_count, workspace.mutable_data_ptr(),
                                           device.stream());
}

}  // namespace

Tensor train_steps(const Tensor& images, const Tensor& labels, const std::optional<Tensor>& order, int64_t batch_size,
                   const std::vector<Tensor>& params, const std::vector<Tensor>& momentum_buffers,
                   const std::vector<int64_t>& layers, const std::vector<int64_t>& groups,
                   const std::vector<double>& options, const std::vector<double>& lr, double scale, double shift,
                   const std::optional<Tensor>& class_weight, int64_t ignore_index, double label_smoothing,
                   int64_t reduction) {
  const TrainStepsArguments a = {images,       labels,       order,           batch_size, params, momentum_buffers,
                                 layers,       groups,       options,         lr,         scale,  shift,
                                 class_weight, ignore_index, label_smoothing, reduction};
  return train_steps_by_dtype(a, [&](const auto& operands) { run(operands, params[0]); });
}

}  // namespace mnist_ext::ops::cuda
