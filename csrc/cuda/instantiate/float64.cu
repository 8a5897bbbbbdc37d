// The kernels of float64, but for the products of tensor cores.
#include "../train_steps.cuh"

namespace mnist_ext::cuda {

Kernels<double> float64_kernels() { return kernels_of<double>(); }

}  // namespace mnist_ext::cuda
