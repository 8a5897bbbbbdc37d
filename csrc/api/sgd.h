// One step of stochastic gradient descent over many parameters, in place.
//
//   g = grad (-grad to maximize) + weight_decay * param
//   buffer = momentum * buffer + (1 - dampening) * g, or g in the first step;  g = buffer, or g + momentum * buffer
//            (nesterov)
//   param -= lr * g
//
// The operations are those of torch.optim.SGD in its order, each rounded to T (a multiply-add is one operation), so
// that the results are the same bits where the instruction set has a fused multiply-add. Aliasing: a param or
// momentum buffer overlaps nothing else, as threads share the tensors among themselves; ops/tensors.h checks that.
// Results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace mnist_ext {

template <class T>
struct SgdTensor {
  int64_t size;
  T* param;
  const T* grad;
  T* momentum_buffer;  // null without momentum
};

struct SgdOptions {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
  bool first_step;  // the momentum buffers hold nothing yet

  bool operator==(const SgdOptions&) const = default;
};

}  // namespace mnist_ext
