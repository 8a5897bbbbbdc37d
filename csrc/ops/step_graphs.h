// What a TrainStep keeps on a CUDA device from one call to the next: the graph of a step and the memory it works in.
#pragma once

#include <memory>
#include <mutex>
#include <optional>

#include "../../kernels/cuda/train_step_sequence.h"
#include "../tensors.h"

namespace mnist_ext::ops {

struct CapturedStep {
  std::mutex mutex;  // of everything else
  mnist_ext::cuda::StepGraph graph;
  std::optional<Tensor> workspace;
  CUstream_st* stream = nullptr;  // where the workspace is used: elsewhere its allocator would hand it out too early
};

// By the numbers that the ops new_captured_step and free_captured_step deal in. Null for 0; another number that is none
// throws.
std::shared_ptr<CapturedStep> captured_step(int64_t number);

}  // namespace mnist_ext::ops
