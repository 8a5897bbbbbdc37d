// Training steps on the CPU: some of them as one program. The same for every instruction set, whose table runs it.
#include <algorithm>
#include <vector>

#include "kernels.h"

namespace mnist_ext::cpu {
namespace {

constexpr StepTraits kTraits = {.largest_fused_k = kLargestFusedK, .always_gathers = false};
// Threads meet some six times a step, which costs nearly nothing between cores that share a cache, and more than a
// small step between others.
constexpr double kGrain = 1.5e6;  // multiply-adds that are worth a thread of their own
// Steps to a program: to start and to end a parallel region takes some microseconds.
constexpr int64_t kStepsTogether = 16;

template <class T>
BadExample first_bad_example(const TrainSteps<T>& steps) {
  const ExampleSource<T>& source = steps.source;
  for (int64_t i = 0; source.order && i < steps.examples; ++i) {
    if (static_cast<uint64_t>(source.order[i]) >= static_cast<uint64_t>(source.image_count)) {
      return {BadExample::order, i};
    }
  }
  for (int64_t i = 0; i < steps.examples; ++i) {
    const int64_t label = source.target[source.order ? source.order[i] : i];
    if (label != steps.ignore_index && static_cast<uint64_t>(label) >= static_cast<uint64_t>(steps.classes())) {
      return {BadExample::label, i};
    }
  }
  return {};
}

}  // namespace

template <class T>
BadExample train_steps(const TrainSteps<T>& steps, void* workspace, StepGraph*, const Launch& launch) {
  const BadExample bad = first_bad_example(steps);
  if (bad.what != BadExample::none) return bad;
  const TrainStepProgram<T> builder(steps, kTraits, workspace);
  std::vector<Entry<T>> entries;
  entries.reserve(std::min(steps.steps(), kStepsTogether) * (3 * steps.layers.size() + 2));
  for (int64_t step = 0; step < steps.steps();) {
    entries.clear();
    for (int64_t i = 0; i < kStepsTogether && step < steps.steps(); ++i) builder.append(step++, entries);
    const Program<T> program = {entries.data(), static_cast<int64_t>(entries.size()), kGrain};
    kernels<T>().run(program, static_cast<char*>(workspace) + builder.workspace_bytes(), launch);
  }
  return {};
}

template <class T>
int64_t train_steps_workspace_bytes(const TrainSteps<T>& steps) {
  CrossEntropyForward<T> loss{};
  loss.problem.batch = steps.rows_of(0);
  loss.problem.positions = 1;
  return TrainStepProgram<T>(steps, kTraits, kNowhere).workspace_bytes() +
         kernels<T>().cross_entropy_workspace_bytes(loss);
}

template BadExample train_steps(const TrainSteps<float>&, void*, StepGraph*, const Launch&);
template BadExample train_steps(const TrainSteps<double>&, void*, StepGraph*, const Launch&);
template int64_t train_steps_workspace_bytes(const TrainSteps<float>&);
template int64_t train_steps_workspace_bytes(const TrainSteps<double>&);

}  // namespace mnist_ext::cpu
