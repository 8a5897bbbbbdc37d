// The products of tf32 by tensor cores.
#include "../product/mma.cuh"
#include "../product/wgmma.cuh"

namespace mnist_ext::cuda {

template bool has_wgmma<float>();
template void launch_mma(const Product<float>&, const Plan&, const Epilogue<float>&, cudaStream_t);
template void launch_wgmma(const Product<float>&, const Plan&, const Epilogue<float>&, cudaStream_t);

}  // namespace mnist_ext::cuda
