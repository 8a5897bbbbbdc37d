// The linear layer's products in float32.
#include "linear_launch.cuh"

namespace mnist_ext::cuda {

template int64_t product_workspace_bytes(const Product<float>&, Precision);
template void product(const Product<float>&, Precision, void*, cudaStream_t);

}  // namespace mnist_ext::cuda
