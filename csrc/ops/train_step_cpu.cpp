// train_steps on the CPU.
#include <torch/csrc/stable/library.h>

#include "train_step_operands.h"

namespace mnist_ext::ops {
namespace {

template <class T>
void run(const TrainStepsOperands<T>& operands) {
  const TrainSteps<T>& steps = operands.steps;
  for (int64_t i = 0; steps.order && i < steps.examples; ++i) {
    check<std::out_of_range>(0 <= steps.order[i] && steps.order[i] < operands.image_count, kTrainSteps,
                             ": order: expected indices of ", operands.image_count, " images, got ", steps.order[i],
                             " at position ", i);
  }
  const int64_t bad = mnist_ext::train_steps<T>(steps, threads());
  if (bad < 0) return;
  const int64_t at = steps.order ? steps.order[bad] : bad;
  fail<std::out_of_range>(kTrainSteps, ": labels: expected class indices in [0, ",
                          steps.layers[steps.depth - 1].out_features, ") or ignore_index ", steps.ignore_index,
                          ", got ", steps.target[at], " at position ", at);
}

Tensor train_steps(const Tensor& images, const Tensor& labels, const std::optional<Tensor>& order, int64_t batch_size,
                   const std::vector<Tensor>& params, const std::vector<Tensor>& momentum_buffers,
                   const std::vector<int64_t>& layers, const std::vector<int64_t>& groups,
                   const std::vector<double>& options, const std::vector<double>& lr, double scale, double shift,
                   const std::optional<Tensor>& class_weight, int64_t ignore_index, double label_smoothing,
                   int64_t reduction, int64_t /* captured */) {
  const TrainStepsArguments a = {images,       labels,       order,           batch_size, params, momentum_buffers,
                                 layers,       groups,       options,         lr,         scale,  shift,
                                 class_weight, ignore_index, label_smoothing, reduction};
  return train_steps_by_dtype(a, [](const auto& operands) { run(operands); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mnist_ext, CPU, m) { m.impl("train_steps", TORCH_BOX(&train_steps)); }

}  // namespace mnist_ext::ops
