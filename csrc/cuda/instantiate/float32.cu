// The kernels of float32, but for the products of tensor cores.
#include "../train_steps.cuh"

namespace mnist_ext::cuda {

Kernels<float> float32_kernels() { return kernels_of<float>(); }

}  // namespace mnist_ext::cuda
