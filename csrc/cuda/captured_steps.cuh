// What differs from step to step of a graph that holds one: the arguments of its kernels are fixed, so that they find
// it in device memory. The host tells it for some hundred steps at once; each step's first kernel moves on by one.
#pragma once

#include "../train_step.h"
#include "device.cuh"

namespace mnist_ext::cuda {

inline constexpr int kToldRates = 384;      // what a kernel's arguments hold
inline constexpr int kCapturedGroups = 16;  // of parameters

// Where the examples of a step are found.
template <class T>
struct ExampleSource {
  Images<T> images;
  ClassIndices target;
  const int64_t* order;
  int64_t image_count;
  int64_t first;  // in order
};

// Of whole batches.
template <class T>
struct ToldSteps {
  ExampleSource<T> examples;  // of the first step
  T* losses;                  // [steps]
  int steps, group_count;
  double lr[kToldRates];  // [steps, group_count]
};
static_assert(sizeof(ToldSteps<double>) + sizeof(void*) <= 4096, "a kernel's arguments");

template <class T>
struct CapturedSteps {
  ToldSteps<T> told;
  int64_t next;      // the step that begins next
  unsigned readers;  // blocks that have read that
  // Of the step that has begun:
  T* loss;
  double lr[kCapturedGroups];
};

inline constexpr unsigned kTellThreads = 128;

template <class T>
__global__ void __launch_bounds__(kTellThreads) tell_steps_kernel(const ToldSteps<T> told, CapturedSteps<T>* steps) {
  for (int i = static_cast<int>(threadIdx.x); i < told.steps * told.group_count; i += kTellThreads) {
    steps->told.lr[i] = told.lr[i];
  }
  if (threadIdx.x != 0) return;
  steps->told.examples = told.examples;
  steps->told.losses = told.losses;
  steps->told.steps = told.steps;
  steps->told.group_count = told.group_count;
  steps->next = 0;
  steps->readers = 0;
}

// Makes step `next` the one that has begun, when all blocks of the kernel have read which it is. Called by all threads.
template <class T>
__device__ void begin_captured_step(CapturedSteps<T>& steps) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  if (atomicAdd(&steps.readers, 1u) != gridDim.x - 1) return;
  const int64_t step = steps.next++;
  steps.readers = 0;
  steps.loss = steps.told.losses + step;
  for (int g = 0; g < steps.told.group_count; ++g) steps.lr[g] = steps.told.lr[step * steps.told.group_count + g];
}

}  // namespace mnist_ext::cuda
