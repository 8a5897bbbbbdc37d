// A program: work for a device, one entry after the other, without returning to the caller in between. The host makes
// the list once. The CPU runs it in one parallel region (cpu/executor.h); CUDA starts a kernel for each entry on a
// stream, or all of them at once as a graph (cuda/executor.cuh).
#pragma once

#include <cstdint>
#include <variant>

#include "cross_entropy.h"
#include "product.h"

namespace mnist_ext {

// Rows of numbers; of T, or of uint8 that count as value * scale + shift.
template <class T>
struct Images {
  const T* values;        // or null:
  const uint8_t* pixels;  // or null
  int64_t row_stride;
  T scale, shift;  // of pixels

  bool operator==(const Images&) const = default;
};

// Where the examples of a step are found: rows order[first], order[first + 1], ... of images and target.
template <class T>
struct ExampleSource {
  Images<T> images;
  ClassIndices target;
  const int64_t* order;  // null: 0, 1, 2, ...
  int64_t image_count;   // rows of images
  int64_t first;

  bool operator==(const ExampleSource&) const = default;
};

template <class T>
struct StepValues;  // CUDA: what differs between the steps that one graph makes, in device memory

// Copies the examples of a step. CUDA checks indices and labels here, by device-side assertion.
template <class T>
struct Gather {
  ExampleSource<T> from;
  int64_t rows, features, classes, ignore_index;
  T* images;                      // [rows, features]
  int64_t* labels;                // [rows]
  StepValues<T>* step = nullptr;  // null, or where `from` is read instead

  bool operator==(const Gather&) const = default;
};

// How the CPU's threads divide an entry among themselves.
enum class Sharing {
  any,       // as is fastest for this product alone
  examples,  // a thread takes the same rows of the batch in each such entry
  neurons,   // a thread takes the same neurons of a layer in each such entry: their weights stay in its core's cache
};

// A loss is summed up behind the next entry that waits, from memory that all losses of a program share: between two
// entries with a loss lies one without that waits.
template <class T>
struct Entry {
  std::variant<Gather<T>, Product<T>, CrossEntropyForward<T>> work;
  bool waits = false;  // reads or overwrites what other threads had to do with in the entries before it
  Sharing sharing = Sharing::any;

  bool operator==(const Entry&) const = default;
};

// In place of the workspace while its bytes are counted: what a product needs depends on which results it has, and on
// their alignment.
inline void* const kNowhere = reinterpret_cast<void*>(uintptr_t{256});

inline constexpr double kProductGrain = 250e3;  // of products alone

template <class T>
struct Program {
  const Entry<T>* entries;
  int64_t count;
  double grain;  // multiply-adds that are worth a thread of their own
};

}  // namespace mnist_ext
