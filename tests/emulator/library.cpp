// The CUDA kernels, as ordinary C++ on the emulator, and its switches.
#include "../../csrc/kernels/cuda/kernels_bfloat16.cu"
#include "../../csrc/kernels/cuda/kernels_float16.cu"
#include "../../csrc/kernels/cuda/kernels_float32.cu"
#include "../../csrc/kernels/cuda/kernels_float64.cu"
#include "../../csrc/kernels/cuda/linear_bfloat16.cu"
#include "../../csrc/kernels/cuda/linear_float16.cu"
#include "../../csrc/kernels/cuda/linear_float32.cu"
#include "../../csrc/kernels/cuda/linear_float64.cu"

extern "C" {

void emulator_set_seed(unsigned seed) { emulator::seed = seed; }

void emulator_set_device(int compute_capability_major, int shared_bytes_of_block, int multiprocessors) {
  emulator::compute_capability_major = compute_capability_major;
  emulator::shared_bytes_of_block = shared_bytes_of_block;
  emulator::multiprocessors = multiprocessors;
}

// tile * 1000 + splits, of a float32 product.
int emulator_linear_plan(int64_t rows, int64_t columns, int64_t depth) {
  const mnist_ext::cuda::SimtPlan plan = mnist_ext::cuda::simt_plan<float>(rows, columns, depth);
  return plan.tile * 1000 + plan.splits;
}

// A float32 product without gate, bias and ReLU, of an a with any strides and a contiguous b.
void emulator_linear_product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_outer,
                             int64_t a_depth, const float* b, float* out, float* row_sums) {
  const mnist_ext::cuda::Product<float> product = {
      rows, columns, depth, {a, a_outer, a_depth}, {}, {b, depth, 1}, nullptr, false, out, row_sums};
  const auto precision = mnist_ext::cuda::Precision::full;
  std::vector<double> workspace(mnist_ext::cuda::product_workspace_bytes(product, precision) / sizeof(double) + 1);
  mnist_ext::cuda::product(product, precision, workspace.data(), nullptr);
}

int emulator_launches() { return emulator::launches; }
}
