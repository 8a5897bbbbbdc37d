// Every CUDA kernel for bfloat16.
#include "cross_entropy_launch.cuh"
#include "sgd.cuh"

namespace mnist_ext::cuda {

template void cross_entropy_forward(const CrossEntropyForward<BFloat16>&, const BFloat16*, bool, BFloat16* const*,
                                    void*, cudaStream_t);
template void cross_entropy_backward(const CrossEntropyBackward<BFloat16>&, cudaStream_t);
template void sgd_step(const SgdTensor<BFloat16>*, int64_t, const SgdOptions&, const double*, cudaStream_t);

}  // namespace mnist_ext::cuda
