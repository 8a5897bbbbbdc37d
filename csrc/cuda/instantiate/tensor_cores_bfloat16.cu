// The products of bfloat16 by tensor cores.
#include "../product/mma_launch.cuh"
#include "../product/wgmma_launch.cuh"

namespace mnist_ext::cuda {

template bool mma_takes(const Product<BFloat16>&);
template int64_t mma_workspace_bytes(const Product<BFloat16>&);
template void mma_product(const Product<BFloat16>&, void*, cudaStream_t);
template bool wgmma_takes(const Product<BFloat16>&);
template int64_t wgmma_workspace_bytes(const Product<BFloat16>&);
template void wgmma_product(const Product<BFloat16>&, void*, cudaStream_t);

}  // namespace mnist_ext::cuda
