// train_steps on CUDA: by the kernels of each op, one after the other, as a CUDA graph where steps repeat. Nothing here
// waits for the device.
#include <atomic>

#include "../../kernels/cuda/train_step_sequence.h"
#include "../train_step_operands.h"
#include "captured_step.h"
#include "device.h"
#include "ops.h"

namespace mnist_ext::ops::cuda {
namespace {

// Beyond, a step takes so long that its launches do not count, and is no reason to hold so much memory.
constexpr int64_t kLargestHeld = int64_t{64} << 20;

std::atomic<bool> graphs_are_used = true;

template <class T>
void run(const TrainStepsOperands<T>& operands, CapturedStep* captured, const Tensor& param) {
  const OnDeviceOf device(param);
  CUstream_st* const stream = device.stream();
  const int64_t bytes = mnist_ext::cuda::train_steps_sequence_workspace_bytes(operands.steps);
  const auto new_workspace = [&] { return empty(device_of(param), aoti_torch_dtype_uint8(), {bytes}); };
  const auto run_in = [&](const Tensor& workspace, mnist_ext::cuda::StepGraph* graph) {
    mnist_ext::cuda::train_steps_in_sequence(operands.steps, operands.image_count, workspace.mutable_data_ptr(), graph,
                                             stream);
  };
  // What the caller captures uses memory of the capture, and may run when ours is gone.
  if (!captured || !graphs_are_used || bytes > kLargestHeld || mnist_ext::cuda::is_capturing(stream)) {
    return run_in(new_workspace(), nullptr);
  }
  const std::lock_guard lock(captured->mutex);
  std::optional<Tensor>& workspace = captured->workspace;
  const bool serves =
      workspace && on_same_device(*workspace, param) && captured->stream == stream && workspace->numel() >= bytes;
  if (!serves) {
    workspace = new_workspace();
    captured->stream = stream;
  }
  run_in(*workspace, &captured->graph);
}

}  // namespace

void set_train_step_graphs(bool enabled) { graphs_are_used = enabled; }

Tensor train_steps(const Tensor& images, const Tensor& labels, const std::optional<Tensor>& order, int64_t batch_size,
                   const std::vector<Tensor>& params, const std::vector<Tensor>& momentum_buffers,
                   const std::vector<int64_t>& layers, const std::vector<int64_t>& groups,
                   const std::vector<double>& options, const std::vector<double>& lr, double scale, double shift,
                   const std::optional<Tensor>& class_weight, int64_t ignore_index, double label_smoothing,
                   int64_t reduction, int64_t captured) {
  const TrainStepsArguments a = {images,       labels,       order,           batch_size, params, momentum_buffers,
                                 layers,       groups,       options,         lr,         scale,  shift,
                                 class_weight, ignore_index, label_smoothing, reduction};
  const auto step = captured_step(captured);
  return train_steps_by_dtype(a, [&](const auto& operands) { run(operands, step.get(), params[0]); });
}

}  // namespace mnist_ext::ops::cuda
