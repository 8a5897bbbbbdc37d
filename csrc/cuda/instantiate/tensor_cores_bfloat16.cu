// The products of bfloat16 by tensor cores.
#include "../product/mma.cuh"
#include "../product/wgmma.cuh"

namespace mnist_ext::cuda {

template bool has_wgmma<BFloat16>();
template void launch_mma(const Product<BFloat16>&, const Plan&, const Epilogue<BFloat16>&, cudaStream_t);
template void launch_wgmma(const Product<BFloat16>&, const Plan&, const Epilogue<BFloat16>&, cudaStream_t);

}  // namespace mnist_ext::cuda
