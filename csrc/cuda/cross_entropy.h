// Softmax cross-entropy on CUDA: ../cross_entropy.h says what is computed. Here pointers are to the device's memory,
// and these differ from the CPU:
//
//   - position_loss, position_max and position_log_sum may be null: not wanted; so may total_weight, and loss.
//   - A bad target ends the kernel with a device-side assertion, as in PyTorch: nothing can be returned, as nothing is
//     waited for. Nothing is read or written out of bounds.
//   - Loss and gradient come in one pass: the row stays in shared memory (of one block, or of a cluster of blocks)
//     between the sum of its exponentials and its gradient. Rows that are too long for that are read twice.
//
// Sums of a row: in T's compute type over 16 bytes, then in double (float for a warp's rows); over positions in double,
// in an order that is fixed by the shape. No atomics but the counter that tells the last block.
#pragma once

#include <cstdint>

#include "../cross_entropy.h"

struct CUstream_st;  // a cudaStream_t points to one

namespace mnist_ext::cuda {

// More would wait for the first ones anyway, and each leaves a partial sum behind. A constant, so that the order of the
// sums does not depend on the device.
inline constexpr int64_t kMaxBlocks = 2048;

// Up to here one block does everything, in one launch: no partial sums, no counting beforehand.
inline constexpr int64_t kSmallElements = 32768, kSmallPositions = 1024;

inline bool one_block_is_enough(int64_t positions, int64_t classes) {
  return positions <= kSmallPositions && positions * classes <= kSmallElements;
}

// Bytes of device memory, aligned to 16, that forward needs until it has run: two counters, what the mean divides by,
// and the partial sums. Often 0.
inline int64_t cross_entropy_workspace_bytes(int64_t batch, int64_t classes, int64_t positions) {
  if (one_block_is_enough(batch * positions, classes)) return 0;
  return 16 + kMaxBlocks * 2 * static_cast<int64_t>(sizeof(double));
}

// grad_output: [1], what x.grad_logits is multiplied by; null: 1. unless_one: do nothing at all if *grad_output is 1,
// for x.grad_logits already holds the gradient of that. loss_place: null, or where the place of the loss of a mean or
// sum is read in place of x.loss, in device memory, when the kernel runs.
template <class T>
void cross_entropy_forward(const CrossEntropyForward<T>& x, const T* grad_output, bool unless_one, T* const* loss_place,
                           void* workspace, CUstream_st* stream);

template <class T>
void cross_entropy_backward(const CrossEntropyBackward<T>& x, CUstream_st* stream);

}  // namespace mnist_ext::cuda
