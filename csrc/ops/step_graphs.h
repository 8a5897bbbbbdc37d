// What a TrainStep keeps on a CUDA device from one call to the next: the graph of a step and the memory it works in.
#pragma once

#include <memory>
#include <mutex>
#include <optional>

#include "tensors.h"

namespace mnist_ext::ops {

inline constexpr const char* kTrainSteps = "mnist_ext.train_steps";

struct HeldGraph {
  std::mutex mutex;  // of everything else
  std::unique_ptr<StepGraph> graph;
  std::optional<Tensor> workspace;
  CUstream_st* stream = nullptr;  // where the workspace is used: elsewhere its allocator would hand it out too early

  // At least so many bytes on like's device, the same from call to call if the stream is.
  void* workspace_for(const Tensor& like, CUstream_st* on_stream, int64_t bytes);
};

// The handle that a caller of the op has. 0 where the kernels have no graphs.
int64_t new_step_graph(const Tensor& like);
void free_step_graph(const Tensor& like, int64_t handle);

// Null for 0; another number that is no handle throws.
std::shared_ptr<HeldGraph> held_graph(int64_t handle);

}  // namespace mnist_ext::ops
