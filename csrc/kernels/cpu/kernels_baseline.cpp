// The kernels for any CPU of this architecture (SSE2 on x86-64, NEON on AArch64).
#define MNIST_EXT_ISA baseline
#include "cross_entropy_impl.h"
#include "kernel_table.h"
#include "linear_impl.h"

namespace mnist_ext {

const KernelTable kernels_baseline = {
    .f32 = {baseline::linear_forward<float>, baseline::linear_backward<float>, baseline::cross_entropy_forward<float>,
            baseline::cross_entropy_backward<float>},
    .f64 = {baseline::linear_forward<double>, baseline::linear_backward<double>,
            baseline::cross_entropy_forward<double>, baseline::cross_entropy_backward<double>},
};

}  // namespace mnist_ext
