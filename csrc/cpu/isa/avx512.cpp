// The kernels for CPUs with AVX-512 F, DQ, BW and VL.
#define MNIST_EXT_ISA avx512
#include "dispatch.h"
#include "table.h"

namespace mnist_ext {

const KernelTable kernels_avx512 = avx512::kTable;

}  // namespace mnist_ext
