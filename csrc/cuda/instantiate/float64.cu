// Every CUDA kernel for float64.
#include "cross_entropy_launch.cuh"
#include "sgd.cuh"

namespace mnist_ext::cuda {

template void cross_entropy_forward(const CrossEntropyForward<double>&, const double*, bool, double* const*, void*,
                                    cudaStream_t);
template void cross_entropy_backward(const CrossEntropyBackward<double>&, cudaStream_t);
template void sgd_step(const SgdTensor<double>*, int64_t, const SgdOptions&, const double*, cudaStream_t);

}  // namespace mnist_ext::cuda
