// What a device offers to the ops: one table of kernels. The CPU has a table for each instruction set, CUDA has one;
// tests register the CUDA kernels on an emulator as another table of the CPU's.
//
// CUDA: pointers are to the device's memory; nothing waits for the device; all is started on the stream, and may be
// captured into a graph. A target or an order that is out of range ends the kernel with a device-side assertion, as in
// PyTorch. Nothing is read or written out of bounds for it on either device.
#pragma once

#include <cstdint>

#include "../programs/linear_cross_entropy.h"
#include "../programs/train_step.h"
#include "cross_entropy.h"
#include "program.h"
#include "sgd.h"

struct CUstream_st;  // a cudaStream_t points to one

namespace mnist_ext {

struct Launch {
  int threads = 1;                // CPU: at most so many
  CUstream_st* stream = nullptr;  // CUDA
};

// A CUDA graph of a step, for a caller whose steps are alike; nothing on the CPU.
class StepGraph {
 public:
  virtual ~StepGraph() = default;
};

// Workspaces are memory of the device, aligned to 64 bytes, whose content does not matter.
template <class T>
struct Kernels {
  // Throws std::bad_alloc on the CPU, having done nothing.
  void (*run)(const Program<T>&, void* workspace, const Launch&);
  int64_t (*workspace_bytes)(const Program<T>&);

  // Writes what a mean over the targets divides by; returns as the two below. workspace: of kWeighTargetsBytes.
  int64_t (*weigh_targets)(const CrossEntropyProblem<T>&, ComputeType<T>* total_weight, void* workspace, const Launch&);

  // Return -1, or on the CPU the first position whose target is neither ignore_index nor in [0, classes); outputs are
  // then incomplete.
  int64_t (*cross_entropy_forward)(const CrossEntropyForward<T>&, void* workspace, const Launch&);
  int64_t (*cross_entropy_backward)(const CrossEntropyBackward<T>&, const Launch&);
  int64_t (*cross_entropy_workspace_bytes)(const CrossEntropyForward<T>&);

  void (*sgd_step)(const SgdTensor<T>*, int64_t count, const SgdOptions&, const Launch&);

  // Null for bfloat16 and float16. On the CPU a bad example is found before anything is changed. graph: null, or one
  // that new_step_graph made; the workspace then has to be the same from call to call.
  BadExample (*train_steps)(const TrainSteps<T>&, void* workspace, StepGraph* graph, const Launch&);
  int64_t (*train_steps_workspace_bytes)(const TrainSteps<T>&);
};

struct KernelTable : Kernels<float>, Kernels<double>, Kernels<BFloat16>, Kernels<Float16> {
  // Null on the CPU, which has no such things:
  StepGraph* (*new_step_graph)();
  bool (*is_capturing)(const Launch&);  // whether what is started goes into the caller's graph instead of running
  bool any_strides = false;             // of operands of products; else those that product.h says of the CPU
  BlockTraits blocks{};
};

// The table in use.
const KernelTable& kernel_table();

template <class T>
const Kernels<T>& kernels() {
  return kernel_table();
}

}  // namespace mnist_ext
