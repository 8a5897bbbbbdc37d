// Fused softmax + cross-entropy of logits against class indices or class probabilities, and its gradients.
//
//   log_p_c = (x_c - max) - log_sum,  log_sum = log(sum_c exp(x_c - max))
//   loss    = -sum_c q_c * log_p_c
//
// q holds the class weights w (1 without) and the label smoothing s:
//   class index t:     q_c = (1 - s) * w_t * [c == t] + s / classes * w_c;  loss 0 where t == ignore_index
//   probabilities t_c: q_c = ((1 - s) * t_c + s / classes) * w_c
//
// max and log_sum are kept apart, as in PyTorch's log_softmax: their sum would lose log_sum for logits around 1e16.
// Precision: everything per position in ComputeType<T>, sums over classes in short chains of it; the reduction over
// positions pairwise in double.
// Logits of -inf only, or with +inf or NaN among them, give NaN, as in PyTorch.
// Aliasing: outputs overlap nothing. Results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace mnist_ext {

enum class Reduction { none, mean, sum };  // the order of torch.nn._reduction.get_enum

enum class TargetKind { indices, probabilities };

// [batch, classes, positions]: element (b, c, s) lies at b * batch_stride + c * class_stride + s. Where there is one
// position only, class_stride is 1: the matrix [batch, classes] with contiguous rows.
template <class T>
struct ClassScores {
  T* data;
  int64_t batch_stride, class_stride;

  bool operator==(const ClassScores&) const = default;
};

struct ClassIndices {
  enum class Type { int64, int32, uint8 };

  const void* data;  // [batch, positions], contiguous
  Type type;

  bool operator==(const ClassIndices&) const = default;

  ClassIndices from(int64_t first) const {
    const int64_t bytes = type == Type::int64 ? 8 : type == Type::int32 ? 4 : 1;
    return {static_cast<const char*>(data) + first * bytes, type};
  }

  int64_t operator[](int64_t i) const {
    switch (type) {
      case Type::int64: return static_cast<const int64_t*>(data)[i];
      case Type::int32: return static_cast<const int32_t*>(data)[i];
      default: return static_cast<const uint8_t*>(data)[i];
    }
  }
};

inline constexpr int64_t kWeighTargetsBytes = 64 << 10;  // of workspace, to add up what targets weigh

// What forward and backward have in common.
template <class T>
struct CrossEntropyProblem {
  int64_t batch, classes, positions;
  ClassScores<const T> logits;
  TargetKind kind;
  ClassIndices target;                 // each in [0, classes) or ignore_index
  ClassScores<const T> probabilities;  // in place of class indices
  const T* weight;                     // [classes], or null
  int64_t ignore_index;
  double label_smoothing;  // in [0, 1]
  Reduction reduction;

  bool operator==(const CrossEntropyProblem&) const = default;
};

// On the CPU, the classes block by block: logits and grad_logits are [batch, size], of these classes. First the blocks
// in order, for maxima, sums and with the last one the loss; then in any order for the gradient, from what was found.
// Of class indices, a single position and no label smoothing; with position_max and position_log_sum, of ignored rows
// too. What only blocks have: with lse = max + log_sum
//   logits are softcap * tanh(logits / softcap), and the gradient is of what they were before
//   the loss of a position that is not ignored is z_loss * lse^2 more, as grad_output counts it
template <class T>
struct ClassBlock {
  int64_t first = 0, size = 0;  // 0: there are no blocks
  bool is_gradient = false;
  double* sums = nullptr;                   // [batch], of exp(x - max) so far
  ComputeType<T>* target_logits = nullptr;  // [batch]
  T* uncapped = nullptr;  // of a softcap, the first time: the logits, in place of which tanh(logits / softcap) is kept
  ComputeType<T> softcap = 0, z_loss = 0;  // 0: none
  T* lse = nullptr;                        // [batch], of all rows; null: not wanted
  const T* grad_lse = nullptr;             // [batch] with grad_lse_stride; null: 0
  int64_t grad_lse_stride = 0;

  bool operator==(const ClassBlock&) const = default;
};

// What is null is not wanted.
template <class T>
struct CrossEntropyForward {
  CrossEntropyProblem<T> problem;
  ComputeType<T>* position_max = nullptr;      // [batch, positions]: 0 where ignored
  ComputeType<T>* position_log_sum = nullptr;  // [batch, positions]: 0 where ignored
  ComputeType<T>* total_weight = nullptr;   // [1]: what the mean divides by: the sum of w_t over the positions that are
                                            // not ignored; with probabilities the number of positions (NaN for 0
                                            // classes)
  const ComputeType<T>* divisor = nullptr;  // [1]: what the mean divides by, where it is one over more positions than
                                            // these; null: total_weight
  T* loss = nullptr;                        // mean or sum: [1]. none: [batch, positions]
  T* grad_logits = nullptr;  // [batch, classes, positions], contiguous; on the CPU it may be the logits themselves,
                             // of class indices without label smoothing
  const T* grad_output = nullptr;  // what grad_logits is multiplied by: as in the backward; null: 1
  int64_t grad_output_stride = 0;
  ClassBlock<T> block{};
  bool unless_one = false;  // do nothing at all if *grad_output is 1: grad_logits already holds the gradient of that
  T* const* loss_place = nullptr;  // CUDA: null, or in device memory, read in place of `loss` when the kernel runs

  bool operator==(const CrossEntropyForward&) const = default;
};

// grad_logits_c = scale * (p_c * sum_k q_k - q_c)    grad_probabilities_c = -scale * (1 - s) * w_c * log_p_c
// and 0 at ignored positions; scale = grad_output (sum), grad_output / total_weight (mean), grad_output[position]
// (none). The gradients are contiguous.
template <class T>
struct CrossEntropyBackward {
  CrossEntropyProblem<T> problem;
  const T* grad_output;                    // [1], or for Reduction::none [batch, positions] with
  int64_t grad_output_stride;              // this distance between positions
  const ComputeType<T>* position_max;      // from the forward
  const ComputeType<T>* position_log_sum;  // from the forward
  const ComputeType<T>* total_weight;      // from the forward
  T* grad_logits;                          // [batch, classes, positions], or null
  T* grad_probabilities;                   // [batch, classes, positions], or null
};

}  // namespace mnist_ext
