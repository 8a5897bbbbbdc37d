// The CUDA ops on the emulator: torch.ops.mnist_ext_emulated.*, for CPU tensors.
#include "../../csrc/ops/cuda/device.h"
#include "../../csrc/ops/cuda/ops.h"
#include "../../csrc/ops/schemas.h"
#include "cuda_emulator.h"

namespace mnist_ext::ops {

struct OnDeviceOf::Guard {};

OnDeviceOf::OnDeviceOf(const Tensor&) {}
OnDeviceOf::~OnDeviceOf() = default;

CUstream_st* OnDeviceOf::stream() const { return emulator::current_stream; }

STABLE_TORCH_LIBRARY(mnist_ext_emulated, m) { define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(mnist_ext_emulated, CPU, m) { cuda::implement_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(mnist_ext_emulated, CompositeExplicitAutograd, m) { cuda::implement_ops_without_tensors(m); }

}  // namespace mnist_ext::ops

extern "C" {

void emulator_set_train_step_graphs(bool enabled) { mnist_ext::ops::cuda::set_train_step_graphs(enabled); }

int emulator_graph_launches() { return emulator::graph_launches; }

void emulator_refuse_graphs(bool refuse) { emulator::graphs_are_refused = refuse; }

// Between the two the ops' stream is being captured; returns how many kernels and the like went into the capture.
void emulator_begin_capture() {
  emulator::current_stream = new CUstream_st;
  cudaStreamBeginCapture(emulator::current_stream, cudaStreamCaptureModeGlobal);
}

int emulator_end_capture() {
  cudaGraph_t graph = nullptr;
  cudaStreamEndCapture(emulator::current_stream, &graph);
  delete std::exchange(emulator::current_stream, nullptr);
  const auto size = static_cast<int>(graph->work.size());
  cudaGraphDestroy(graph);
  return size;
}
}
