// Every kernel for one instruction set, as a table. Compiled for each of them: with its flags, and its name as
// MNIST_EXT_ISA.
#include "kernels.h"

#include "executor.h"

namespace mnist_ext::MNIST_EXT_ISA {

static_assert(cpu::kLargestFusedK <= kBlockK);

template <class T>
constexpr Kernels<T> kernels_of() {
  Kernels<T> kernels = {.run = nullptr,
                        .workspace_bytes = workspace_bytes<T>,
                        .weigh_targets = weigh_targets<T>,
                        .cross_entropy_forward = cross_entropy_forward<T>,
                        .cross_entropy_backward = cross_entropy_backward<T>,
                        .cross_entropy_workspace_bytes = ForwardPass<T>::workspace_bytes,
                        .sgd_step = sgd_step<T>,
                        .train_steps = nullptr,
                        .train_steps_workspace_bytes = nullptr};
  if constexpr (is_half<T>) {
    kernels.run = run_program_half<T>;
  } else {
    kernels.run = run_program<T>;
    kernels.train_steps = cpu::train_steps<T>;
    kernels.train_steps_workspace_bytes = cpu::train_steps_workspace_bytes<T>;
  }
  return kernels;
}

constexpr KernelTable kTable = {{kernels_of<float>()},
                                {kernels_of<double>()},
                                {kernels_of<BFloat16>()},
                                {kernels_of<Float16>()},
                                nullptr,
                                nullptr,
                                false,
                                cpu::kBlockTraits};

}  // namespace mnist_ext::MNIST_EXT_ISA
