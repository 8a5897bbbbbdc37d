// Training steps by the CUDA kernels of linear, cross-entropy and SGD, one after the other. ../train_step.h says what
// is computed, with the bits of those kernels. Here pointers are to the device's memory, but for layers, groups and lr,
// which are read before the call returns. A bad target or a bad index in order ends the kernel with a device-side
// assertion, as in cross_entropy.h, when the steps before it have been made: nothing is read or written out of bounds.
#pragma once

#include <vector>

#include "../train_step.h"
#include "graph.h"

struct CUstream_st;  // a cudaStream_t points to one

namespace mnist_ext::cuda {

// The step of a whole batch as a CUDA graph, which serves for further calls too. Whatever it does not find in device
// memory when it runs is in `holds`, and a call for which that is something else does not use it.
struct StepGraph {
  Graph graph;
  std::vector<int64_t> holds;    // sizes, options and addresses; empty: there is no graph
  std::vector<int64_t> started;  // the same of the last step that was made without it
  bool refused = false;          // by the driver, once
};

// Bytes of device memory, aligned to 16, that train_steps_in_sequence needs until it has run.
template <class T>
int64_t train_steps_sequence_workspace_bytes(const TrainSteps<T>& x);

// images: how many there are, of which order names some.
// graph: the caller's, for what is made twice with the same workspace, parameters and settings: that is captured, and
// from then on a step is one launch, with the same bits. Kernel by kernel are launched the first step of its kind,
// which also loads the kernels, one whose momentum buffers hold nothing yet, a last, smaller batch, and everything
// where the driver refuses the capture. Null: each kernel is a launch, as it has to be where the stream is being
// captured already.
template <class T>
void train_steps_in_sequence(const TrainSteps<T>& x, int64_t images, void* workspace, StepGraph* graph,
                             CUstream_st* stream);

}  // namespace mnist_ext::cuda
