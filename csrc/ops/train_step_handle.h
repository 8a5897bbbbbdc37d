// What stays the same between the calls of train_steps, described once; the caller has a handle for it.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "device.h"

namespace mnist_ext::ops {

inline constexpr const char* kTrainSteps = "mnist_ext.train_steps";
inline constexpr int64_t kFrozen = -1;  // in place of a group

using Refused = std::invalid_argument;  // ValueError in Python, as TrainStep promises

struct TrainStepSettings {
  std::vector<bool> relu, bias;     // of each layer: whether it has one
  std::vector<int64_t> groups;      // of each parameter: the weights, then the biases that there are
  std::vector<SgdOptions> options;  // of each group; lr and first_step do not count
  double scale, shift;              // of uint8 images
  std::optional<Tensor> class_weight;
  int64_t ignore_index;
  double label_smoothing;
  Reduction reduction;

  std::size_t layers() const { return relu.size(); }
  bool has_momentum(std::size_t param) const {
    return groups[param] != kFrozen && options[groups[param]].momentum != 0;
  }
};

// CUDA: the graph of a step, and the memory it works in, which has to be the same from call to call.
struct HeldGraph {
  std::mutex mutex;                  // of everything else
  std::unique_ptr<StepGraph> graph;  // null where the kernels have none
  std::optional<Tensor> workspace;
  CUstream_st* stream = nullptr;  // where the workspace is used: elsewhere its allocator would hand it out too early

  // At least so many bytes on like's device, the same from call to call if the stream is.
  void* workspace_for(const Tensor& like, CUstream_st* on_stream, int64_t bytes);
};

struct TrainStepHandle {
  const TrainStepSettings settings;
  HeldGraph held;
};

// Throws if it is no handle.
std::shared_ptr<TrainStepHandle> train_step_of(int64_t handle);

int64_t new_train_step(const Tensor& like, const std::vector<bool>& relu, const std::vector<bool>& bias,
                       const std::vector<int64_t>& groups, const std::vector<double>& momentum,
                       const std::vector<double>& dampening, const std::vector<double>& weight_decay,
                       const std::vector<bool>& nesterov, const std::vector<bool>& maximize, double scale, double shift,
                       const std::optional<Tensor>& class_weight, int64_t ignore_index, double label_smoothing,
                       int64_t reduction, bool graph);
void free_train_step(const Tensor& like, int64_t handle);

}  // namespace mnist_ext::ops
