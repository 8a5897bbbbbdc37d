// Training steps by the CUDA kernels of linear, cross-entropy and SGD, one after the other: for every model, dtype and
// device. ../train_step.h says what is computed; the differences of train_step.h hold here too, except that each result
// has the bits of those kernels, and that steps before a bad example have been made.
#pragma once

#include <vector>

#include "../train_step.h"
#include "graph.h"

struct CUstream_st;

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

// graph: the caller's, for what is made twice with the same workspace, parameters and settings: that is captured, and
// from then on a step is one launch, with the same bits. Null: each kernel is a launch, as it has to be where the
// stream is being captured already.
template <class T>
void train_steps_in_sequence(const TrainSteps<T>& x, int64_t images, void* workspace, StepGraph* graph,
                             CUstream_st* stream);

}  // namespace mnist_ext::cuda
