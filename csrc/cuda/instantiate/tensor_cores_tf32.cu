// The products of a linear layer by mma.sync, for float32 rounded to TF32.
#include "linear_mma_launch.cuh"

namespace mnist_ext::cuda {

template bool mma_takes(const Product<float>&, Precision);
template int64_t mma_workspace_bytes(const Product<float>&);
template void mma_product(const Product<float>&, void*, cudaStream_t);

}  // namespace mnist_ext::cuda
