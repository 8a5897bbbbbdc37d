// What a TrainStep keeps on a CUDA device from one call to the next: the graph of a step and the memory it works in.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "device.h"

namespace mnist_ext::ops {

inline constexpr const char* kTrainSteps = "mnist_ext.train_steps";

struct HeldGraph {
  std::mutex mutex;  // of everything else
  std::unique_ptr<StepGraph> graph;
  std::optional<Tensor> workspace;
  CUstream_st* stream = nullptr;  // where the workspace is used: elsewhere its allocator would hand it out too early

  // At least so many bytes on like's device, the same from call to call if the stream is.
  void* workspace_for(const Tensor& like, CUstream_st* on_stream, int64_t bytes) {
    const bool serves =
        workspace && on_same_device(*workspace, like) && stream == on_stream && workspace->numel() >= bytes;
    if (!serves) {
      workspace = empty(like, aoti_torch_dtype_uint8(), {bytes});
      stream = on_stream;
    }
    return workspace->mutable_data_ptr();
  }
};

struct Registry {
  std::mutex mutex;
  int64_t last = 0;
  std::map<int64_t, std::shared_ptr<HeldGraph>> graphs;
};

// Never destroyed: when the process ends CUDA may end first.
inline Registry& registry() {
  static Registry* const all = new Registry;
  return *all;
}

// The handle that a caller of the op has. 0 where the kernels have no graphs.
inline int64_t new_step_graph(const Tensor&) {
  const auto new_graph = kernel_table().new_step_graph;
  if (!new_graph) return 0;
  auto held = std::make_shared<HeldGraph>();
  held->graph.reset(new_graph());
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  all.graphs[++all.last] = std::move(held);
  return all.last;
}

// Null for 0; another number that is no handle throws.
inline std::shared_ptr<HeldGraph> held_graph(int64_t handle) {
  if (handle == 0) return nullptr;
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  const auto found = all.graphs.find(handle);
  check<std::invalid_argument>(found != all.graphs.end(), kTrainSteps,
                               ": graph: expected 0 or a handle from new_step_graph, not freed yet, got ", handle);
  return found->second;
}

inline void free_step_graph(const Tensor&, int64_t handle) {
  const auto held = held_graph(handle);  // destroyed behind the lock
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  all.graphs.erase(handle);
}

}  // namespace mnist_ext::ops
