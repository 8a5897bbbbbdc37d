// The products of a fused linear layer on CUDA. ../linear.h says what they are; each is one Product here:
//
//   forward       rows = batch,         columns = out_features, depth = in_features,  a = input,         b = weight
//   grad_input    rows = batch,         columns = in_features,  depth = out_features, a = grad_output,   b = weight^T
//   grad_weight   rows = out_features,  columns = in_features,  depth = batch,        a = grad_output^T, b = input^T
//
// Precision: products are summed in ComputeType<T> (bfloat16 and float16: in float32) and rounded to T once, after bias
// and ReLU; row_sums in double, or by tensor-core kernels in float32 with what is rounded away summed beside.
// Precision::tf32 allows kernels to round the factors of float32 products to TF32 first (never what row_sums adds up);
// those without tensor cores do not. The order of summation depends on the shape, the strides and the device only: the
// same call gives the same bits.
// Layout: an operand is read at any strides and from any address; where one stride is 1 and addresses
// are aligned to 16 bytes the launcher picks faster kernels. out is row-major and contiguous. 64-bit offsets
// throughout. Aliasing: out and row_sums overlap nothing. Any size may be 0; a sum over nothing is 0. Host: nothing
// waits for the device; everything is started on `stream`, and may be captured into a graph.
#pragma once

#include <cstdint>

#include "../dtypes.h"

struct CUstream_st;

namespace mnist_ext::cuda {

enum class Precision { full, tf32 };

// A matrix of `outer` (rows of a, columns of b) by depth.
template <class T>
struct Operand {
  const T* data;
  int64_t outer_stride, depth_stride;  // in elements; may be 0 or negative
};

template <class T>
struct Product {
  int64_t rows, columns, depth;
  Operand<T> a;     // [rows, depth]
  Operand<T> gate;  // as a, or null data: where it is <= 0, a counts as 0 (ReLU's output; a NaN lets a pass)
  Operand<T> b;     // [columns, depth]
  const T* bias;    // [columns], or null
  bool relu;        // of a * b^T + bias
  T* out;           // [rows, columns], or null: row_sums alone
  T* row_sums;      // [rows], sums of a (behind its gate) over depth: grad_bias; or null
};

// Bytes of device memory, aligned to 16, that `product` wants as workspace; its content does not matter.
template <class T>
int64_t product_workspace_bytes(const Product<T>& product, Precision precision);

// Precision::tf32 counts for float32 only.
template <class T>
void product(const Product<T>& product, Precision precision, void* workspace, CUstream_st* stream);

}  // namespace mnist_ext::cuda
