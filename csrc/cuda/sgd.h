// Stochastic gradient descent on CUDA: ../sgd.h says what is computed. One launch for up to kSgdTensors parameters.
#pragma once

#include "../sgd.h"

struct CUstream_st;  // a cudaStream_t points to one

namespace mnist_ext::cuda {

// lr: null, or where the learning rate is read in place of options.lr, in device memory, when the kernel runs.
template <class T>
void sgd_step(const SgdTensor<T>* tensors, int64_t count, const SgdOptions& options, const double* lr,
              CUstream_st* stream);

}  // namespace mnist_ext::cuda
