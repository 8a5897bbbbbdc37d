// Every CUDA kernel for float16.
#include "cross_entropy_launch.cuh"
#include "sgd.cuh"

namespace mnist_ext::cuda {

template void cross_entropy_forward(const CrossEntropyForward<Float16>&, const Float16*, bool, Float16* const*, void*,
                                    cudaStream_t);
template void cross_entropy_backward(const CrossEntropyBackward<Float16>&, cudaStream_t);
template void sgd_step(const SgdTensor<Float16>*, int64_t, const SgdOptions&, const double*, cudaStream_t);

}  // namespace mnist_ext::cuda
