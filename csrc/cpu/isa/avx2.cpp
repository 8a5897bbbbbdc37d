// The kernels for CPUs with AVX2 and FMA.
#define MNIST_EXT_ISA avx2
#include "dispatch.h"
#include "table.h"

namespace mnist_ext {

const KernelTable kernels_avx2 = avx2::kTable;

}  // namespace mnist_ext
