// The products of a linear layer by mma.sync, for bfloat16.
#include "linear_mma_launch.cuh"

namespace mnist_ext::cuda {

template bool mma_takes(const Product<BFloat16>&, Precision);
template int64_t mma_workspace_bytes(const Product<BFloat16>&);
template void mma_product(const Product<BFloat16>&, void*, cudaStream_t);

}  // namespace mnist_ext::cuda
