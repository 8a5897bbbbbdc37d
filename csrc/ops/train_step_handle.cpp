#include "train_step_handle.h"

#include <algorithm>
#include <map>

namespace mnist_ext::ops {
namespace {

struct Registry {
  std::mutex mutex;
  int64_t last = 0;
  std::map<int64_t, std::shared_ptr<TrainStepHandle>> steps;
};

// Never destroyed: when the process ends CUDA may end first.
Registry& registry() {
  static Registry* const all = new Registry;
  return *all;
}

template <class List>
void check_length(const List& list, std::size_t expected, const char* of, const char* name) {
  check<Refused>(list.size() == expected, kTrainSteps, ": ", name, ": expected one for each of ", expected, " ", of,
                 ", got ", list.size());
}

}  // namespace

void* HeldGraph::workspace_for(const Tensor& like, CUstream_st* on_stream, int64_t bytes) {
  const bool serves =
      workspace && on_same_device(*workspace, like) && stream == on_stream && workspace->numel() >= bytes;
  if (!serves) {
    workspace = empty(like, aoti_torch_dtype_uint8(), {bytes});
    stream = on_stream;
  }
  return workspace->mutable_data_ptr();
}

int64_t new_train_step(const Tensor&, const std::vector<bool>& relu, const std::vector<bool>& bias,
                       const std::vector<int64_t>& groups, const std::vector<double>& momentum,
                       const std::vector<double>& dampening, const std::vector<double>& weight_decay,
                       const std::vector<bool>& nesterov, const std::vector<bool>& maximize, double scale, double shift,
                       const std::optional<Tensor>& class_weight, int64_t ignore_index, double label_smoothing,
                       int64_t reduction, bool graph) {
  check<Refused>(!relu.empty(), kTrainSteps, ": relu: expected at least one layer");
  check_length(bias, relu.size(), "layers", "bias");
  check_length(groups, relu.size() + static_cast<std::size_t>(std::count(bias.begin(), bias.end(), true)), "params",
               "groups");
  check_length(dampening, momentum.size(), "groups", "dampening");
  check_length(weight_decay, momentum.size(), "groups", "weight_decay");
  check_length(nesterov, momentum.size(), "groups", "nesterov");
  check_length(maximize, momentum.size(), "groups", "maximize");
  const int64_t last_group = static_cast<int64_t>(momentum.size()) - 1;
  for (const int64_t group : groups) {
    check<Refused>(kFrozen <= group && group <= last_group, kTrainSteps, ": groups: expected -1 to ", last_group,
                   ", got ", group);
  }
  check<Refused>(0 <= label_smoothing && label_smoothing <= 1, kTrainSteps,
                 ": label_smoothing: expected a number in [0, 1], got ", label_smoothing);
  check<Refused>(reduction == 1 || reduction == 2, kTrainSteps, ": reduction: expected 1 (mean) or 2 (sum), got ",
                 reduction);
  std::vector<SgdOptions> options;
  for (std::size_t g = 0; g < momentum.size(); ++g) {
    options.push_back({0, momentum[g], dampening[g], weight_decay[g], nesterov[g], maximize[g], false});
  }
  const auto new_graph = kernel_table().new_step_graph;
  TrainStepSettings settings = {
      relu,  bias,         groups,       std::move(options), scale,
      shift, class_weight, ignore_index, label_smoothing,    static_cast<Reduction>(reduction)};
  auto step = std::shared_ptr<TrainStepHandle>(new TrainStepHandle{std::move(settings), {}});
  if (graph && new_graph) step->held.graph.reset(new_graph());
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  all.steps[++all.last] = std::move(step);
  return all.last;
}

void free_train_step(const Tensor&, int64_t handle) {
  const auto step = train_step_of(handle);  // destroyed behind the lock
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  all.steps.erase(handle);
}

std::shared_ptr<TrainStepHandle> train_step_of(int64_t handle) {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  const auto found = all.steps.find(handle);
  check<Refused>(found != all.steps.end(), kTrainSteps,
                 ": step: expected a handle from new_train_step, not freed yet, got ", handle);
  return found->second;
}

}  // namespace mnist_ext::ops
