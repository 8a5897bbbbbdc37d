// The CPU's float32 products and training steps on that model: built by tests/amx_model.py.
#include "amx.h"

#include "../../csrc/cpu/executor.h"
#include "../../csrc/cpu/kernels.h"

namespace mnist_ext {
namespace {

KernelTable table_of_model() {
  KernelTable table{};
  Kernels<float>& kernels = table;
  kernels.run = MNIST_EXT_ISA::run_program<float>;
  kernels.workspace_bytes = MNIST_EXT_ISA::workspace_bytes<float>;
  kernels.cross_entropy_workspace_bytes = MNIST_EXT_ISA::ForwardPass<float>::workspace_bytes;
  kernels.train_steps = cpu::train_steps<float>;
  kernels.train_steps_workspace_bytes = cpu::train_steps_workspace_bytes<float>;
  return table;
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable table = table_of_model();
  return table;
}

}  // namespace mnist_ext

extern "C" __attribute__((visibility("default"))) const void* amx_model_kernel_table() {
  return &mnist_ext::kernel_table();
}
