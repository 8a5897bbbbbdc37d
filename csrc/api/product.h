// A product and what becomes of it: C = relu(A * B^T + bias) behind a mask, and the row sums of A. A linear layer is
// three of them (programs/layer.h):
//
//                 M              N              K              A               B           row sums
//   forward       batch          out_features   in_features    input           weight
//   grad_input    batch          in_features    out_features   grad_output     weight^T
//   grad_weight   out_features   in_features    batch          grad_output^T   input^T     grad_bias
//
// Precision: products are accumulated in ComputeType<T> and rounded to T once, after bias and ReLU.
//   CPU:  by fused multiply-add where the instruction set has it, in vector lanes and in blocks of K, of a large K in
//         pieces of blocks: no chain of additions is longer than 512, or than some square root of a 256th of K. Row
//         sums: over 8 steps of K in ComputeType<T>, and these added up in double.
//         By a matrix unit (AMX): float32 split into three parts of 8 bits, six of the nine products of these summed in
//         float32. Where a factor is inf, NaN, huge or tiny, by fused multiply-add.
//   CUDA: row sums in double, or by tensor cores in float32 with what is rounded away summed beside.
//   accumulate: one more addition in T. For float and double only.
// Layout: operands are read at any strides on CUDA; on the CPU one stride of each is 1, and A's outer stride where row
// sums are wanted. C is row-major and contiguous. A stride of 0 (an expanded tensor) is allowed.
// Aliasing: what is written overlaps nothing else. Any size may be 0; a sum over nothing is 0.
// The order of summation depends on the sizes, the strides, T and the instruction set or device, not on the number of
// threads; but which part of a product leaves the matrix unit for such factors does.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "sgd.h"

namespace mnist_ext {

// A matrix of `outer` (M of A, N of B) by K.
template <class T>
struct Operand {
  const T* data = nullptr;
  int64_t outer_stride = 0, k_stride = 0;  // in elements

  bool operator==(const Operand&) const = default;
};

// What a result is the gradient of: that parameter is updated by it, as in sgd.h.
template <class T>
struct ParameterUpdate {
  T* param = nullptr;  // contiguous; null: no update
  T* momentum_buffer = nullptr;
  SgdOptions options{};
  const double* lr = nullptr;  // CUDA: null, or in device memory, read in place of options.lr when the kernel runs

  bool operator==(const ParameterUpdate&) const = default;
};

template <class T>
struct Product {
  int64_t M = 0, N = 0, K = 0;
  Operand<T> a{};           // [M, K]
  Operand<T> relu_mask{};   // [M, K], ReLU's output: where it is <= 0, A counts as 0 (NaN lets A pass); or null data
  Operand<T> b{};           // [N, K]
  const T* bias = nullptr;  // [N], or null
  bool relu = false;
  bool accumulate = false;  // C and the row sums are added to what is there; without bias, ReLU, mask and update
  // Of float32: the factors may be rounded to TF32 on CUDA, to 16 bits on a CPU's matrix unit; never what row_sums adds
  // up.
  bool allow_tf32 = false;
  const T* c_mask = nullptr;  // [M, N], contiguous, ReLU's output: where it is <= 0, C is 0; or null
  T* c = nullptr;             // [M, N]; null: not kept
  T* row_sums = nullptr;      // [M], sums over K of A behind its mask; null: not kept
  // C and the row sums need no memory where they update a parameter and K is at most StepTraits::largest_fused_k.
  ParameterUpdate<T> update{}, row_sums_update{};

  bool forms_c() const { return c || update.param; }
  bool forms_row_sums() const { return row_sums || row_sums_update.param; }

  bool operator==(const Product&) const = default;
};

}  // namespace mnist_ext
