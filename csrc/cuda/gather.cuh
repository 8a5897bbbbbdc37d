// The images and labels of a step. A bad index or label ends the kernel with a device-side assertion.
#pragma once

#include <cstdio>

#include "captured_steps.cuh"

namespace mnist_ext::cuda {

[[noreturn]] __device__ inline void report_bad_example(const char* what, int64_t count, int64_t got, int64_t position) {
  printf("mnist_ext.train_steps: %s: expected indices in [0, %lld), got %lld at position %lld\n", what,
         static_cast<long long>(count), static_cast<long long>(got), static_cast<long long>(position));
  __trap();
}

// The image that an example is, unchecked.
__device__ inline int64_t image_at(const int64_t* order, int64_t example) { return order ? order[example] : example; }

__device__ inline int64_t label_at(const ClassIndices& labels, int64_t image) {
  switch (labels.type) {
    case ClassIndices::Type::int64: return static_cast<const int64_t*>(labels.data)[image];
    case ClassIndices::Type::int32: return static_cast<const int32_t*>(labels.data)[image];
    default: return static_cast<const uint8_t*>(labels.data)[image];
  }
}

// For certain one of `images`.
__device__ inline int64_t checked_image(int64_t image, int64_t example, int64_t images) {
  if (static_cast<uint64_t>(image) >= static_cast<uint64_t>(images)) {
    report_bad_example("order", images, image, example);
  }
  return image;
}

// ignore_index, or a class for certain.
__device__ inline int64_t checked_label(int64_t label, int64_t image, int64_t ignore_index, int64_t classes) {
  if (label != ignore_index && static_cast<uint64_t>(label) >= static_cast<uint64_t>(classes)) {
    report_bad_example("labels", classes, label, image);
  }
  return label;
}

template <class T>
struct Examples {
  T* images;        // [rows, features]
  int64_t* labels;  // [rows]
};

template <class T>
struct GatherWork {
  ExampleSource<T> from;
  CapturedSteps<T>* captured;  // null, or where that is told instead
  int64_t rows, features, classes, ignore_index;
  Examples<T> out;
};

inline constexpr unsigned kGatherThreads = 256;

// A block walks over rows.
template <class T>
__global__ void __launch_bounds__(kGatherThreads) gather_examples_kernel(const GatherWork<T> work) {
  ExampleSource<T> from = work.from;
  if (work.captured) {
    from = work.captured->told.examples;
    from.first += work.captured->next * work.rows;
  }
  for (int64_t row = blockIdx.x; row < work.rows; row += gridDim.x) {
    const int64_t example = from.first + row;
    const int64_t image = checked_image(image_at(from.order, example), example, from.image_count);
    if (threadIdx.x == 0) {
      const int64_t label = label_at(from.target, image);
      work.out.labels[row] = checked_label(label, image, work.ignore_index, work.classes);
    }
    const int64_t begin = image * from.images.row_stride;
    T* to = work.out.images + row * work.features;
    for (int64_t i = threadIdx.x; i < work.features; i += kGatherThreads) {
      to[i] = from.images.pixels
                  ? fma(static_cast<T>(from.images.pixels[begin + i]), from.images.scale, from.images.shift)
                  : from.images.values[begin + i];
    }
  }
  if (work.captured) begin_captured_step(*work.captured);
}

// At least one row.
template <class T>
void gather_examples(const GatherWork<T>& work, cudaStream_t stream) {
  constexpr int64_t kMaxBlocks = 2048;
  const Shape shape = {static_cast<unsigned>(work.rows < kMaxBlocks ? work.rows : kMaxBlocks), kGatherThreads};
  launch("train_steps gather_examples", gather_examples_kernel<T>, shape, stream, work);
}

}  // namespace mnist_ext::cuda
