// Training steps: programs/train_step.h's program of a step, kernel by kernel or replayed as a graph, with the same
// bits. A bad label or a bad index in order ends the kernel with a device-side assertion when the steps before it have
// been made.
//
// Where the caller gives a graph, what is made twice with the same workspace, parameters and settings is captured, and
// from then on a step is one launch. Kernel by kernel are launched the first step of its kind, which also loads the
// kernels, one whose momentum buffers hold nothing yet, a last, smaller batch, and everything where the driver refuses
// the capture.
#pragma once

#include "../programs/train_step.h"
#include "executor.cuh"
#include "step_graph.cuh"

namespace mnist_ext::cuda {

// Gradients are formed in memory, images copied: a graph finds those of any step at the same place.
inline constexpr StepTraits kStepTraits = {.largest_fused_k = -1, .always_gathers = true};

inline constexpr int64_t kWorkspaceAlignment = 64;

template <class T>
class StepRunner {
 public:
  StepRunner(const TrainSteps<T>& steps, void* workspace)
      : steps_(steps),
        workspace_(static_cast<char*>(workspace)),
        step_(steps, kStepTraits, workspace_ + kValuesBytes) {}

  int64_t workspace_bytes() const {
    int64_t most = 0;
    // Of a whole step, or of the last, smaller one.
    for (const int64_t step : {int64_t{0}, steps_.steps() - 1}) {
      const std::vector<Entry<T>> entries = entries_of(step);
      most = std::max(most, cuda::workspace_bytes(program_of(entries)));
    }
    return kValuesBytes + step_.workspace_bytes() + most;
  }

  void run(CapturedStep* graph, cudaStream_t stream) const {
    const int64_t whole = steps_.examples / steps_.batch_size;
    int64_t done = 0;
    if (graph && whole > 0 && groups() <= kReplayedGroups) done = replay(*graph, whole, stream);
    for (; done < steps_.steps(); ++done) start_step(done, stream);
  }

 private:
  static constexpr int64_t kValuesBytes =
      (sizeof(StepValues<T>) + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;

  int64_t groups() const { return static_cast<int64_t>(steps_.groups.size()); }
  StepValues<T>* values() const { return reinterpret_cast<StepValues<T>*>(workspace_); }

  static Program<T> program_of(const std::vector<Entry<T>>& entries) {
    return {entries.data(), static_cast<int64_t>(entries.size()), 0};
  }

  std::vector<Entry<T>> entries_of(int64_t step) const {
    std::vector<Entry<T>> entries;
    step_.append(step, entries);
    return entries;
  }

  void start(const std::vector<Entry<T>>& entries, cudaStream_t stream) const {
    cuda::run(program_of(entries), workspace_ + kValuesBytes + step_.workspace_bytes(), stream);
  }

  void start_step(int64_t step, cudaStream_t stream) const { start(entries_of(step), stream); }

  // Returns how many of the first `whole` steps it has made.
  int64_t replay(CapturedStep& graph, int64_t whole, cudaStream_t stream) const {
    std::vector<Entry<T>> entries;
    step_.append_replayed(values(), &values()->loss, values()->lr, entries);
    const CapturedStep::Known fixed = CapturedStep::Fixed<T>(entries, workspace_);
    const bool held = graph.holds == fixed;
    int64_t done = 0;
    if (has_new_buffers() || (!held && graph.started != fixed)) start_step(done++, stream);
    graph.started = fixed;
    if (done == whole || graph.refused) return done;
    if (!held) graph.capture(fixed, [&](cudaStream_t capturing) { start(entries, capturing); });
    if (graph.refused) return done;
    const int64_t uploaded_at_once = kUploadedRates / std::max<int64_t>(groups(), 1);
    while (done < whole) {
      const int64_t count = std::min(uploaded_at_once, whole - done);
      upload(done, count, stream);
      for (int64_t i = 0; i < count; ++i) graph.launch(stream);
      done += count;
    }
    return done;
  }

  void upload(int64_t first, int64_t count, cudaStream_t stream) const {
    UploadedSteps<T> uploaded{};
    uploaded.source = steps_.source;
    uploaded.source.first = first * steps_.batch_size;
    uploaded.losses = steps_.losses + first;
    uploaded.steps = static_cast<int>(count);
    uploaded.groups = static_cast<int>(groups());
    std::copy_n(steps_.lr + first * groups(), count * groups(), uploaded.lr);
    upload_steps(uploaded, values(), stream);
  }

  bool has_new_buffers() const {
    const auto is_new = [](const TrainedParameter<T>& p) { return p.momentum_buffer && p.first_step; };
    return std::any_of(steps_.layers.begin(), steps_.layers.end(),
                       [&](const TrainedLayer<T>& layer) { return is_new(layer.weight) || is_new(layer.bias); });
  }

  const TrainSteps<T>& steps_;
  char* workspace_;  // StepValues, what the program of a step holds, what its entries want
  TrainStepProgram<T> step_;
};

template <class T>
Kernels<T> kernels_of() {
  Kernels<T> kernels = {
      .run = [](const Program<T>& program, void* workspace,
                const Launch& launch) { run(program, workspace, launch.stream); },
      .workspace_bytes = [](const Program<T>& program) { return workspace_bytes(program); },
      .weigh_targets =
          [](const CrossEntropyProblem<T>& problem, ComputeType<T>* total_weight, void* workspace,
             const Launch& launch) {
            weigh_targets(problem, total_weight, workspace, launch.stream);
            return int64_t{-1};
          },
      .cross_entropy_forward =
          [](const CrossEntropyForward<T>& args, void* workspace, const Launch& launch) {
            cross_entropy_forward(args, workspace, launch.stream);
            return int64_t{-1};
          },
      .cross_entropy_backward =
          [](const CrossEntropyBackward<T>& args, const Launch& launch) {
            cross_entropy_backward(args, launch.stream);
            return int64_t{-1};
          },
      .cross_entropy_workspace_bytes =
          [](const CrossEntropyForward<T>& args) { return cross_entropy_workspace_bytes(args); },
      .sgd_step = [](const SgdTensor<T>* tensors, int64_t count, const SgdOptions& options,
                     const Launch& launch) { sgd_step(tensors, count, options, nullptr, launch.stream); },
      .train_steps = nullptr,
      .train_steps_workspace_bytes = nullptr};
  if constexpr (sizeof(T) >= sizeof(float)) {
    kernels.train_steps = [](const TrainSteps<T>& steps, void* workspace, StepGraph* graph, const Launch& launch) {
      StepRunner<T>(steps, workspace).run(static_cast<CapturedStep*>(graph), launch.stream);
      return BadExample{};
    };
    kernels.train_steps_workspace_bytes = [](const TrainSteps<T>& steps) {
      return StepRunner<T>(steps, kNowhere).workspace_bytes();
    };
  }
  return kernels;
}

}  // namespace mnist_ext::cuda
