// The products of a linear layer by wgmma, for bfloat16.
#include "linear_wgmma_launch.cuh"

namespace mnist_ext::cuda {

template bool wgmma_takes(const Product<BFloat16>&, Precision);
template int64_t wgmma_workspace_bytes(const Product<BFloat16>&);
template void wgmma_product(const Product<BFloat16>&, void*, cudaStream_t);

}  // namespace mnist_ext::cuda
