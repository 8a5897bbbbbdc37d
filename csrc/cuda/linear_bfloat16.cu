// The linear layer's products in bfloat16.
#include "linear_launch.cuh"

namespace mnist_ext::cuda {

template int64_t product_workspace_bytes(const Product<BFloat16>&, Precision);
template void product(const Product<BFloat16>&, Precision, void*, cudaStream_t);

}  // namespace mnist_ext::cuda
