// Training steps by the CUDA kernels of linear, cross-entropy and SGD, one after the other: for every model, dtype and
// device. ../train_step.h says what is computed; the differences of train_step.h hold here too, except that each result
// has the bits of those kernels, and that steps before a bad example have been made.
#pragma once

#include "../train_step.h"

struct CUstream_st;

namespace mnist_ext::cuda {

// Bytes of device memory, aligned to 16, that train_steps_in_sequence needs until it has run.
template <class T>
int64_t train_steps_sequence_workspace_bytes(const TrainSteps<T>& x);

template <class T>
void train_steps_in_sequence(const TrainSteps<T>& x, int64_t images, void* workspace, CUstream_st* stream);

}  // namespace mnist_ext::cuda
