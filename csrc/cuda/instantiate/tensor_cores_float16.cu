// The products of float16 by tensor cores.
#include "../product/mma.cuh"
#include "../product/wgmma.cuh"

namespace mnist_ext::cuda {

template bool has_wgmma<Float16>();
template void launch_mma(const Product<Float16>&, const Plan&, const Epilogue<Float16>&, cudaStream_t);
template void launch_wgmma(const Product<Float16>&, const Plan&, const Epilogue<Float16>&, cudaStream_t);

}  // namespace mnist_ext::cuda
