// The table of all dtypes. Each has a file of its own in instantiate/.
#include "step_graph.cuh"

namespace mnist_ext::cuda {

Kernels<float> float32_kernels();
Kernels<double> float64_kernels();
Kernels<BFloat16> bfloat16_kernels();
Kernels<Float16> float16_kernels();

extern const KernelTable kernels_cuda;
const KernelTable kernels_cuda = [] {
  KernelTable table{float32_kernels(), float64_kernels(), bfloat16_kernels(), float16_kernels()};
  table.any_strides = true;
  // Of logits and their gradient: an H100's second-level cache holds 50 MB.
  table.blocks = {
      .cached_bytes = int64_t{24} << 20, .most_bytes = int64_t{256} << 20, .in_place = false, .flops_per_byte = 0};
  table.new_step_graph = []() -> StepGraph* { return new CapturedStep; };
  table.is_capturing = [](const Launch& launch) { return is_capturing(launch.stream); };
  return table;
}();

}  // namespace mnist_ext::cuda

const mnist_ext::KernelTable& mnist_ext::kernel_table() { return cuda::kernels_cuda; }
