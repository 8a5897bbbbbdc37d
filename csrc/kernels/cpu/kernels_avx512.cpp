// The kernels for CPUs with AVX-512 F, DQ, BW and VL.
#define MNIST_EXT_ISA avx512
#include "cross_entropy_impl.h"
#include "kernel_table.h"
#include "linear_impl.h"

namespace mnist_ext {

const KernelTable kernels_avx512 = {
    .f32 = {avx512::linear_forward<float>, avx512::linear_backward<float>, avx512::cross_entropy_forward<float>,
            avx512::cross_entropy_backward<float>},
    .f64 = {avx512::linear_forward<double>, avx512::linear_backward<double>, avx512::cross_entropy_forward<double>,
            avx512::cross_entropy_backward<double>},
};

}  // namespace mnist_ext
