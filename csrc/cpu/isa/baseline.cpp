// The kernels for any CPU of this architecture (SSE2 on x86-64, NEON on AArch64).
#define MNIST_EXT_ISA baseline
#include "dispatch.h"
#include "table.h"

namespace mnist_ext {

const KernelTable kernels_baseline = baseline::kTable;

}  // namespace mnist_ext
