// The products of a linear layer on the tensor cores of compute capability 9.0: bfloat16, float16, and float32 rounded
// to TF32. docs/hopper-linear.md says what is taken, and why.
#pragma once

#include "linear.h"

namespace mnist_ext::cuda {

// Whether wgmma_product does this product on the current device.
template <class T>
bool wgmma_takes(const Product<T>& product, Precision precision);

template <class T>
int64_t wgmma_workspace_bytes(const Product<T>& product);

template <class T>
void wgmma_product(const Product<T>& product, void* workspace, CUstream_st* stream);

}  // namespace mnist_ext::cuda
