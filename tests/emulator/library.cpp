// All of csrc/cuda as ordinary C++ on the emulator: its table of kernels, and what tests ask for beside it.
#include "library.h"

#include <array>
#include <string>

#include "../../csrc/cuda/instantiate/float32.cu"
#include "../../csrc/cuda/instantiate/float64.cu"
#include "../../csrc/cuda/instantiate/half.cu"
#include "../../csrc/cuda/instantiate/tensor_cores_bfloat16.cu"
#include "../../csrc/cuda/instantiate/tensor_cores_float16.cu"
#include "../../csrc/cuda/instantiate/tensor_cores_tf32.cu"
#include "../../csrc/cuda/table.cu"

namespace {

using namespace mnist_ext;

// Of any dtype; tests/emulated.py has the same.
struct AnyProduct {
  int64_t M, N, K;
  const void* a;
  int64_t a_strides[2];
  const void* relu_mask;
  int64_t mask_strides[2];
  const void* b;
  int64_t b_strides[2];
  const void* bias;
  int64_t relu, allow_tf32;
  const void* c_mask;
  void* c;
  void* row_sums;
};

template <class T>
Product<T> typed(const AnyProduct& p) {
  return {.M = p.M,
          .N = p.N,
          .K = p.K,
          .a = {static_cast<const T*>(p.a), p.a_strides[0], p.a_strides[1]},
          .relu_mask = {static_cast<const T*>(p.relu_mask), p.mask_strides[0], p.mask_strides[1]},
          .b = {static_cast<const T*>(p.b), p.b_strides[0], p.b_strides[1]},
          .bias = static_cast<const T*>(p.bias),
          .relu = p.relu != 0,
          .allow_tf32 = p.allow_tf32 != 0,
          .c_mask = static_cast<const T*>(p.c_mask),
          .c = static_cast<T*>(p.c),
          .row_sums = static_cast<T*>(p.row_sums)};
}

// Calls with the product in its dtype.
template <class Call>
auto with_dtype(const char* dtype, const AnyProduct& p, const Call& call) {
  const std::string name = dtype;
  if (name == "float32") return call(typed<float>(p));
  if (name == "float64") return call(typed<double>(p));
  if (name == "bfloat16") return call(typed<BFloat16>(p));
  return call(typed<Float16>(p));
}

// Also where another main loop would be taken as the faster one.
template <class T>
void make(const Product<T>& p, cuda::MainLoop main_loop) {
  if constexpr (sizeof(T) <= 4) {
    const bool wgmma = main_loop == cuda::MainLoop::wgmma;
    if (wgmma && (!cuda::wgmma_can(p) || !cuda::has_wgmma<T>())) throw std::logic_error("not taken");
  }
  constexpr int64_t kGuard = 64;
  const int64_t bytes = cuda::product_workspace_bytes(p, main_loop);
  std::vector<unsigned char> workspace(static_cast<size_t>(bytes + kGuard), 0xff);
  cuda::start_product(p, main_loop, bytes > 0 ? workspace.data() : nullptr, nullptr);
  for (int64_t i = bytes; i < bytes + kGuard; ++i) {
    if (workspace[static_cast<size_t>(i)] != 0xff) throw std::logic_error("emulator: a write beyond the workspace");
  }
}

}  // namespace

const char* emulated::error_of(const std::function<void()>& call) {
  static std::string what;
  try {
    call();
  } catch (const std::exception& error) {
    return (what = error.what()).c_str();
  }
  return nullptr;
}

extern "C" {

EXPORTED const void* emulator_kernel_table() {
  static const KernelTable table = [] {
    KernelTable cuda = kernel_table();
    cuda.blocks.cached_bytes = cuda.blocks.most_bytes = 4096;  // so that few rows are many blocks
    return cuda;
  }();
  return &table;
}

EXPORTED void emulator_set_seed(unsigned seed) { emulator::seed = seed; }

EXPORTED void emulator_set_device(int compute_capability_major, int multiprocessors) {
  emulator::compute_capability_major = compute_capability_major;
  emulator::multiprocessors = multiprocessors;
}

EXPORTED int emulator_launches() { return emulator::launches; }
EXPORTED int emulator_graph_launches() { return emulator::graph_launches; }
EXPORTED void emulator_refuse_graphs(bool refuse) { emulator::graphs_are_refused = refuse; }
EXPORTED int emulator_bank_conflicts() { return emulator::bank_conflicts; }

// Between the two the current stream is being captured; returns how many kernels and the like went into the capture.
EXPORTED void emulator_begin_capture() {
  emulator::current_stream = new CUstream_st;
  cudaStreamBeginCapture(emulator::current_stream, cudaStreamCaptureModeGlobal);
}

EXPORTED int emulator_end_capture() {
  cudaGraph_t graph = nullptr;
  cudaStreamEndCapture(emulator::current_stream, &graph);
  delete std::exchange(emulator::current_stream, nullptr);
  const auto size = static_cast<int>(graph->work.size());
  cudaGraphDestroy(graph);
  return size;
}

// Null, or what the kernels threw.
EXPORTED const char* emulator_product(const char* dtype, int main_loop, const AnyProduct* product) {
  return emulated::error_of(
      [&] { with_dtype(dtype, *product, [&](const auto& p) { make(p, static_cast<cuda::MainLoop>(main_loop)); }); });
}

// {main loop, tile, splits}, as the table chooses them.
EXPORTED void emulator_plan(const char* dtype, const AnyProduct* product, int* plan) {
  with_dtype(dtype, *product, [&](const auto& p) {
    const cuda::Plan chosen = cuda::plan_for(cuda::main_loop_for(p), p);
    plan[0] = static_cast<int>(chosen.main_loop);
    plan[1] = chosen.tile;
    plan[2] = chosen.tiling.splits;
  });
}
}
