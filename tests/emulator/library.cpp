// All of csrc/cuda as ordinary C++ on the emulator: its table of kernels, and what tests ask for beside it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "../../csrc/cuda/instantiate/float32.cu"
#include "../../csrc/cuda/instantiate/float64.cu"
#include "../../csrc/cuda/instantiate/half.cu"
#include "../../csrc/cuda/instantiate/tensor_cores_bfloat16.cu"
#include "../../csrc/cuda/instantiate/tensor_cores_float16.cu"
#include "../../csrc/cuda/instantiate/tensor_cores_tf32.cu"
#include "../../csrc/cuda/table.cu"
#include "mistakes.h"

namespace {

using namespace mnist_ext;
using pybind11::arg;

using Strides = std::array<int64_t, 2>;

// A product by name: of tensors, or None, of any dtype.
using AnyProduct = pybind11::dict;

template <class T>
T* data(const pybind11::object& tensor) {
  if (tensor.is_none()) return nullptr;
  return reinterpret_cast<T*>(tensor.attr("data_ptr")().cast<uintptr_t>());
}

template <class T>
Operand<T> operand(const pybind11::object& tensor) {
  if (tensor.is_none()) return {};
  const auto strides = tensor.attr("stride")().cast<Strides>();
  return {data<const T>(tensor), strides[0], strides[1]};
}

template <class T>
Product<T> typed(const AnyProduct& p) {
  const pybind11::object a = p["a"], b = p["b"];
  const auto a_strides = p["a_strides"].cast<Strides>();  // those of PyTorch's tensors are never negative
  return {.M = static_cast<int64_t>(pybind11::len(a)),
          .N = static_cast<int64_t>(pybind11::len(b)),
          .K = a.attr("size")(1).cast<int64_t>(),
          .a = {data<const T>(a), a_strides[0], a_strides[1]},
          .relu_mask = operand<T>(p["relu_mask"]),
          .b = operand<T>(b),
          .bias = data<const T>(p["bias"]),
          .relu = p["relu"].cast<bool>(),
          .allow_tf32 = p["allow_tf32"].cast<bool>(),
          .c_mask = data<const T>(p["c_mask"]),
          .c = data<T>(p["c"]),
          .row_sums = data<T>(p["row_sums"])};
}

// Calls with the product in the dtype of A.
template <class Call>
auto with_dtype(const AnyProduct& p, const Call& call) {
  const std::string dtype = pybind11::str(p["a"].attr("dtype"));
  if (dtype == "torch.float32") return call(typed<float>(p));
  if (dtype == "torch.float64") return call(typed<double>(p));
  if (dtype == "torch.bfloat16") return call(typed<BFloat16>(p));
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

void set_device(int compute_capability_major, int multiprocessors) {
  emulator::compute_capability_major = compute_capability_major;
  emulator::multiprocessors = multiprocessors;
}

uintptr_t kernel_table_address() {
  static const KernelTable table = [] {
    KernelTable cuda = kernel_table();
    cuda.blocks.cached_bytes = cuda.blocks.most_bytes = 4096;  // so that few rows are many blocks
    return cuda;
  }();
  return reinterpret_cast<uintptr_t>(&table);
}

// Returns how many kernels and the like have gone into the capture.
int end_capture() {
  cudaGraph_t graph = nullptr;
  cudaStreamEndCapture(emulator::current_stream, &graph);
  delete std::exchange(emulator::current_stream, nullptr);
  const auto size = static_cast<int>(graph->work.size());
  cudaGraphDestroy(graph);
  return size;
}

// {main loop, tile from small to large, splits of K}, as the table chooses them.
std::array<int, 3> plan(const AnyProduct& product) {
  return with_dtype(product, [](const auto& p) {
    const cuda::Plan chosen = cuda::plan_for(cuda::main_loop_for(p), p);
    return std::array{static_cast<int>(chosen.main_loop), chosen.tile, static_cast<int>(chosen.tiling.splits)};
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("kernel_table_address", kernel_table_address, "For mnist_ext._C.register_kernels.");
  m.def("set_seed", [](unsigned seed) { emulator::seed = seed; }, "Of the order in which threads and blocks run.");
  m.def("set_device", set_device, arg("compute_capability_major") = 9, arg("multiprocessors") = 132,
        "Choose the device that is played, an H200 by default.");
  m.def(
      "refuse_graphs", [](bool refuse) { emulator::graphs_are_refused = refuse; }, arg("refuse") = true,
      "Choose whether the driver that is played makes no CUDA graphs.");
  m.def(
      "fail_captured_launches", [](bool fail) { emulator::captured_launches_fail = fail; }, arg("fail") = true,
      "Choose whether kernels cannot be launched into a capture.");
  m.def("launches", [] { return emulator::launches; }, "Count the kernels started so far.");
  m.def("graph_launches", [] { return emulator::graph_launches; }, "Count the CUDA graphs started so far.");
  m.def("bank_conflicts", [] { return emulator::bank_conflicts; }, "Count those of ldmatrix and load_word so far.");
  m.def("begin_capture", [] {
    emulator::current_stream = new CUstream_st;
    cudaStreamBeginCapture(emulator::current_stream, cudaStreamCaptureModeGlobal);
  });
  m.def("end_capture", end_capture);

  m.def("make", [](const AnyProduct& product, int main_loop) {
    with_dtype(product, [&](const auto& p) { make(p, static_cast<cuda::MainLoop>(main_loop)); });
  });
  m.def("plan", plan);

  m.def("sum_of_neighbours", mistakes::sum_of_neighbours);
  m.def("sum_of_copies", mistakes::sum_of_copies);
  m.def("deadlock", mistakes::deadlock);
  m.def("overflow", mistakes::overflow);
  m.def("misaligned", mistakes::misaligned);
  m.def("misaligned_copy", mistakes::misaligned_copy);
  m.def("copy_beyond", mistakes::copy_beyond);
}
