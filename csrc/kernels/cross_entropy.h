// Fused softmax + cross-entropy over the rows of a matrix of logits, and its gradient.
//
//   log_softmax(x)_j = (x_j - max) - log_sum,  log_sum = log(sum_j exp(x_j - max))
//   loss_i = -log_softmax(logits_i)_target_i
//
// max and log_sum are kept apart, as in PyTorch's log_softmax: their sum would lose log_sum for logits around 1e16.
// Precision: exp and the differences in T; sums of exponentials per block of a row in T, across blocks in double; the
// reduction over rows pairwise in double.
// A row of -inf only, or with +inf or NaN in it, gives NaN, as in PyTorch.
// Layout: logits are row-major with unit column stride; logits_stride is the distance in elements between rows.
// Aliasing: outputs overlap nothing. Results do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace mnist_ext {

enum class Reduction { none, mean, sum };  // the order of torch.nn._reduction.get_enum

template <class T>
struct CrossEntropyForward {
  int64_t rows, classes;
  const T* logits;  // [rows, classes]
  int64_t logits_stride;
  const int64_t* target;  // [rows], each in [0, classes) or ignore_index
  int64_t ignore_index;
  Reduction reduction;
  T* row_loss;      // [rows]: the loss of each row, 0 where ignored
  T* row_max;       // [rows]: 0 where ignored
  T* row_log_sum;   // [rows]: 0 where ignored
  T* loss;          // [1]: mean over the rows that count (NaN if none does) or sum; not written for Reduction::none
  T* total_weight;  // [1]: the number of rows that count
};

// grad_logits = scale * (softmax(logits) - onehot(target)), 0 in ignored rows;
// scale = grad_output (sum), grad_output / total_weight (mean), grad_output[row] (none).
template <class T>
struct CrossEntropyBackward {
  int64_t rows, classes;
  const T* grad_output;  // [1], or for Reduction::none [rows] with stride grad_output_stride
  int64_t grad_output_stride;
  const T* logits;  // [rows, classes]
  int64_t logits_stride;
  const int64_t* target;  // [rows]
  int64_t ignore_index;
  Reduction reduction;
  const T* row_max;       // from the forward
  const T* row_log_sum;   // from the forward
  const T* total_weight;  // from the forward
  T* grad_logits;         // [rows, classes], contiguous
};

// Both return -1, or the first row whose target is neither ignore_index nor in [0, classes). Nothing is read or written
// out of bounds for such a row, but the outputs are then incomplete.
template <class T>
int64_t cross_entropy_forward(const CrossEntropyForward<T>& args, int threads);

template <class T>
int64_t cross_entropy_backward(const CrossEntropyBackward<T>& args, int threads);

}  // namespace mnist_ext
