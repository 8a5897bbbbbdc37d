// Every CUDA kernel for float32.
#include "cross_entropy_launch.cuh"
#include "sgd.cuh"

namespace mnist_ext::cuda {

template void cross_entropy_forward(const CrossEntropyForward<float>&, const float*, bool, float* const*, void*,
                                    cudaStream_t);
template void cross_entropy_backward(const CrossEntropyBackward<float>&, cudaStream_t);
template void sgd_step(const SgdTensor<float>*, int64_t, const SgdOptions&, const double*, cudaStream_t);

}  // namespace mnist_ext::cuda
