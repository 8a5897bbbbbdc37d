// The linear layer's products in float64.
#include "linear_launch.cuh"

namespace mnist_ext::cuda {

template int64_t product_workspace_bytes(const Product<double>&, Precision);
template void product(const Product<double>&, Precision, void*, cudaStream_t);

}  // namespace mnist_ext::cuda
