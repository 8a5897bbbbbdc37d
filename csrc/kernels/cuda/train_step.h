// Many training steps of a small multilayer perceptron in one launch: ../train_step.h says what is computed. One
// cluster of blocks keeps parameters and momentum buffers in shared memory from the first step to the last; device
// memory sees images, labels and losses only, and the parameters once at the end.
//
// Here pointers are to the device's memory, but for layers, groups and lr, which are read before the call returns, and
// these differ from the CPU:
//
//   - Sums are in float32, each in an order that is fixed by the sizes and the cluster: the same call gives the same
//     bits. They are not those of the kernels called one after the other. With images of bytes the first layer's are
//     made by tensor cores, as exact as in float32; there an infinite weight gives NaN.
//   - A bad target or a bad index in order ends the kernel with a device-side assertion, as in cross_entropy.h. Nothing
//     is read or written out of bounds, and no parameter is written.
//
// docs/persistent-step.md tells how it is built and by which numbers.
#pragma once

#include "../train_step.h"

struct CUstream_st;  // a cudaStream_t points to one

namespace mnist_ext::cuda {

// Returns false, having done nothing, where the current device cannot: it has no clusters, or what a block keeps does
// not fit into its shared memory. images: how many there are, of which order names some.
bool train_steps_in_cluster(const TrainSteps<float>& x, int64_t images, CUstream_st* stream);

}  // namespace mnist_ext::cuda
