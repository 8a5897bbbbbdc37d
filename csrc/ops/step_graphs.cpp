// The captured steps, by their numbers.
#include "captured_step.h"

#include <map>

#include "../train_step_operands.h"
#include "ops.h"

namespace mnist_ext::ops {
namespace {

struct Registry {
  std::mutex mutex;
  int64_t last = 0;
  std::map<int64_t, std::shared_ptr<CapturedStep>> steps;
};

// Never destroyed: when the process ends CUDA may end first.
Registry& registry() {
  static Registry* const all = new Registry;
  return *all;
}

}  // namespace

std::shared_ptr<CapturedStep> captured_step(int64_t number) {
  if (number == 0) return nullptr;
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  const auto found = all.steps.find(number);
  check<std::invalid_argument>(found != all.steps.end(), kTrainSteps,
                               ": captured: expected 0 or a number from new_captured_step, not freed yet, got ",
                               number);
  return found->second;
}

namespace cuda {

int64_t new_captured_step() {
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  all.steps[++all.last] = std::make_shared<CapturedStep>();
  return all.last;
}

void free_captured_step(int64_t number) {
  const auto step = captured_step(number);  // destroyed behind the lock
  Registry& all = registry();
  const std::lock_guard lock(all.mutex);
  all.steps.erase(number);
}

}  // namespace cuda
}  // namespace mnist_ext::ops
