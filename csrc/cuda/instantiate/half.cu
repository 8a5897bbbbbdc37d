// The kernels of bfloat16 and float16, but for the products of tensor cores.
#include "../train_steps.cuh"

namespace mnist_ext::cuda {

Kernels<BFloat16> bfloat16_kernels() { return kernels_of<BFloat16>(); }
Kernels<Float16> float16_kernels() { return kernels_of<Float16>(); }

}  // namespace mnist_ext::cuda
