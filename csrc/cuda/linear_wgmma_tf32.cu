// The products of a linear layer by wgmma, for float32 rounded to TF32.
#include "linear_wgmma_launch.cuh"

namespace mnist_ext::cuda {

template bool wgmma_takes(const Product<float>&, Precision);
template int64_t wgmma_workspace_bytes(const Product<float>&);
template void wgmma_product(const Product<float>&, void*, cudaStream_t);

}  // namespace mnist_ext::cuda
