// The products of a linear layer on tensor cores by mma.sync: bfloat16, float16, and float32 rounded to TF32; from
// compute capability 8.0 on; at any strides and addresses.
#pragma once

#include "linear.h"

namespace mnist_ext::cuda {

// Whether mma_product does this product on the current device.
template <class T>
bool mma_takes(const Product<T>& product, Precision precision);

template <class T>
int64_t mma_workspace_bytes(const Product<T>& product);

template <class T>
void mma_product(const Product<T>& product, void* workspace, CUstream_st* stream);

}  // namespace mnist_ext::cuda
