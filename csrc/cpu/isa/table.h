// Every kernel for one instruction set, as a table.
#pragma once

#include "cross_entropy_impl.h"
#include "kernel_table.h"
#include "linear_half.h"
#include "linear_impl.h"
#include "mlp_impl.h"
#include "sgd_impl.h"
#include "train_step_impl.h"

namespace mnist_ext::MNIST_EXT_ISA {

template <class T>
constexpr KernelsOf<T> kernels_of() {
  if constexpr (is_half<T>) {
    return {linear_forward_half<T>,
            linear_backward_half<T>,
            cross_entropy_forward<T>,
            cross_entropy_backward<T>,
            sgd_step<T>,
            nullptr,
            nullptr,
            nullptr};
  } else {
    return {linear_forward<T>, linear_backward<T>, cross_entropy_forward<T>, cross_entropy_backward<T>,
            sgd_step<T>,       mlp_forward<T>,     mlp_backward<T>,          train_steps<T>};
  }
}

inline constexpr KernelTable kTable = {kernels_of<float>(), kernels_of<double>(), kernels_of<BFloat16>(),
                                       kernels_of<Float16>()};

}  // namespace mnist_ext::MNIST_EXT_ISA
