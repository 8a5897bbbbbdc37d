// The kernels for CPUs with AVX2 and FMA.
#define MNIST_EXT_ISA avx2
#include "cross_entropy_impl.h"
#include "kernel_table.h"
#include "linear_impl.h"

namespace mnist_ext {

const KernelTable kernels_avx2 = {
    .f32 = {avx2::linear_forward<float>, avx2::linear_backward<float>, avx2::cross_entropy_forward<float>,
            avx2::cross_entropy_backward<float>},
    .f64 = {avx2::linear_forward<double>, avx2::linear_backward<double>, avx2::cross_entropy_forward<double>,
            avx2::cross_entropy_backward<double>},
};

}  // namespace mnist_ext
