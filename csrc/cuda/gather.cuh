// The examples of a step, copied to where its products read them, and what differs between the steps that one graph
// makes: a graph's kernels have fixed arguments, so that they find it in device memory. The host uploads it for some
// hundred steps at once; each step's gather moves on by one. A bad index or label ends the kernel with a device-side
// assertion.
#pragma once

#include "../api/program.h"
#include "cross_entropy/kernel.cuh"

namespace mnist_ext {

namespace cuda {

inline constexpr int kUploadedRates = 384;  // what a kernel's arguments hold
inline constexpr int kReplayedGroups = 16;  // of parameters

// Of whole batches.
template <class T>
struct UploadedSteps {
  ExampleSource<T> source;  // of the first step
  T* losses;                // [steps]
  int steps, groups;
  double lr[kUploadedRates];  // [steps, groups]
};
static_assert(sizeof(UploadedSteps<double>) + sizeof(void*) <= 4096, "a kernel's arguments");

}  // namespace cuda

template <class T>
struct StepValues {
  cuda::UploadedSteps<T> uploaded;
  int64_t next;      // the step that begins next
  unsigned readers;  // blocks that have read that
  // Of the step that has begun:
  T* loss;
  double lr[cuda::kReplayedGroups];
};

}  // namespace mnist_ext

namespace mnist_ext::cuda {

inline constexpr unsigned kUploadThreads = 128, kGatherThreads = 256;

template <class T>
__global__ void __launch_bounds__(kUploadThreads)
    upload_steps_kernel(const UploadedSteps<T> uploaded, StepValues<T>* values) {
  for (int i = static_cast<int>(threadIdx.x); i < uploaded.steps * uploaded.groups; i += kUploadThreads) {
    values->uploaded.lr[i] = uploaded.lr[i];
  }
  if (threadIdx.x != 0) return;
  values->uploaded.source = uploaded.source;
  values->uploaded.losses = uploaded.losses;
  values->uploaded.steps = uploaded.steps;
  values->uploaded.groups = uploaded.groups;
  values->next = 0;
  values->readers = 0;
}

template <class T>
void upload_steps(const UploadedSteps<T>& uploaded, StepValues<T>* values, cudaStream_t stream) {
  launch("train_steps upload_steps", upload_steps_kernel<T>, Shape{1, kUploadThreads}, stream, uploaded, values);
}

// Makes step `next` the one that has begun, when all blocks of the kernel have read which it is. Called by all threads.
template <class T>
__device__ void begin_step(StepValues<T>& values) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  if (atomicAdd(&values.readers, 1u) != gridDim.x - 1) return;
  const UploadedSteps<T>& uploaded = values.uploaded;
  const int64_t step = values.next++;
  values.readers = 0;
  values.loss = uploaded.losses + step;
  for (int g = 0; g < uploaded.groups; ++g) values.lr[g] = uploaded.lr[step * uploaded.groups + g];
}

// A block walks over rows.
template <class T>
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(const Gather<T> work) {
  ExampleSource<T> from = work.from;
  if (work.step) {
    from = work.step->uploaded.source;
    from.first += work.step->next * work.rows;
  }
  for (int64_t row = blockIdx.x; row < work.rows; row += gridDim.x) {
    const int64_t example = from.first + row, image = from.order ? from.order[example] : example;
    check_index("train_steps: order", from.image_count, image, example);
    if (threadIdx.x == 0) {
      const int64_t label = index_at(from.target, image);
      if (label != work.ignore_index) check_index("train_steps: labels", work.classes, label, image);
      work.labels[row] = label;
    }
    const int64_t begin = image * from.images.row_stride;
    T* to = work.images + row * work.features;
    for (int64_t i = threadIdx.x; i < work.features; i += kGatherThreads) {
      to[i] = from.images.pixels
                  ? fma(static_cast<T>(from.images.pixels[begin + i]), from.images.scale, from.images.shift)
                  : from.images.values[begin + i];
    }
  }
  if (work.step) begin_step(*work.step);
}

// At least one row.
template <class T>
void gather(const Gather<T>& work, cudaStream_t stream) {
  constexpr int64_t kBlocks = 2048;
  const Shape shape = {static_cast<unsigned>(work.rows < kBlocks ? work.rows : kBlocks), kGatherThreads};
  launch("train_steps gather", gather_kernel<T>, shape, stream, work);
}

}  // namespace mnist_ext::cuda
