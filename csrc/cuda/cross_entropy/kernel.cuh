// The kernels of softmax cross-entropy: what happens to one position, and how threads are dealt out to positions.
#pragma once

#include <cstdio>
#include <type_traits>

#include "../../api/cross_entropy.h"
#include "../device/elements.cuh"
#include "../device/thread_groups.cuh"

namespace mnist_ext::cuda {

// Of a block, and at most: the registers of a thread are limited to 128 by that.
inline constexpr unsigned kCrossEntropyThreads = 256, kMostCrossEntropyThreads = 512;

// Everything that a kernel is given.
template <class T>
struct Work {
  using A = ComputeType<T>;

  CrossEntropyProblem<T> problem;
  bool forward;  // else max and log_sum are read
  A *position_max, *position_log_sum;
  A* total_weight;        // written by a forward
  const A* mean_divisor;  // read for the gradient of a mean; null: the one block counts by itself
  const A* loss_divisor;  // of a mean; null: what these positions weigh
  T* loss;                // null: not wanted
  T* const* loss_place;   // null, or in device memory: instead of loss
  T *grad_logits, *grad_probabilities;
  const T* grad_output;  // null: 1
  int64_t grad_output_stride;
  bool unless_one;
  A every, of_target;    // s / classes, 1 - s, with the label smoothing s
  double* partial_sums;  // [blocks][2]: loss and weight
  unsigned* counter;     // of blocks that are done, 0 at first

  __device__ bool has_nothing_to_do() const { return unless_one && widen(*grad_output) == A(1); }
};

template <class T>
struct Sums {
  double loss = 0, weight = 0;
};

// Ends the kernel unless `got` is in [0, count).
__device__ inline void check_index(const char* what, int64_t count, int64_t got, int64_t position) {
  if (static_cast<uint64_t>(got) < static_cast<uint64_t>(count)) return;
  printf("mnist_ext.%s: expected indices in [0, %lld), got %lld at position %lld\n", what,
         static_cast<long long>(count), static_cast<long long>(got), static_cast<long long>(position));
  __trap();
}

__device__ inline int64_t index_at(const ClassIndices& target, int64_t i) {
  switch (target.type) {
    case ClassIndices::Type::int64: return static_cast<const int64_t*>(target.data)[i];
    case ClassIndices::Type::int32: return static_cast<const int32_t*>(target.data)[i];
    default: return static_cast<const uint8_t*>(target.data)[i];
  }
}

// The target of a position; ignore_index, or a class for certain.
template <class T>
__device__ int64_t checked_target(const CrossEntropyProblem<T>& p, int64_t position) {
  const int64_t t = index_at(p.target, position);
  if (t != p.ignore_index) check_index("cross_entropy: target", p.classes, t, position);
  return t;
}

template <class T>
__device__ ComputeType<T> weight_of(const CrossEntropyProblem<T>& p, int64_t c) {
  return p.weight ? widen(p.weight[c]) : ComputeType<T>(1);
}

// The logits of a position.
template <class T>
struct Row {
  const T* data;
  int64_t stride;  // between classes
  int64_t classes;
};

// Calls f(class, pack of elements) for all classes of the row, each by one thread of the group.
template <class T, class Group, class F>
__device__ void for_each_pack(const Row<T>& row, const Group& group, const F& f) {
  const int64_t n = row.classes;
  const int rank = group.rank(), size = group.size();
  if (Group::kAlone || row.stride != 1) {
    for (int64_t c = rank; c < n; c += size) f(c, load_pack<T, 1>(row.data + c * row.stride));
    return;
  }
  constexpr int kSize = kPack<T>;
  const int64_t past = elements_past_alignment(row.data);
  int64_t head = past ? kSize - past : 0;
  if (head > n) head = n;
  const int64_t packs = (n - head) / kSize, tail = head + packs * kSize;
  for (int64_t c = rank; c < head; c += size) f(c, load_pack<T, 1>(row.data + c));
  for (int64_t i = rank; i < packs; i += size) {
    f(head + i * kSize, load_pack<T, kSize>(row.data + head + i * kSize));
  }
  for (int64_t c = tail + rank; c < n; c += size) f(c, load_pack<T, 1>(row.data + c));
}

// Whether other classes than the target have a coefficient.
template <class T>
__host__ __device__ bool is_spread(const CrossEntropyProblem<T>& p) {
  return p.kind == TargetKind::probabilities || p.label_smoothing > 0;
}

template <class T, class Group>
struct Position {
  using A = ComputeType<T>;
  // Long chains of additions are in double.
  using Sum = std::conditional_t<std::is_same_v<Group, OneWarp>, A, double>;

  const Work<T>& work;
  const CrossEntropyProblem<T>& p;
  const Group& group;
  int64_t index;  // among all positions
  Row<T> logits;
  const T* probabilities;               // of class 0
  T *grad_logits, *grad_probabilities;  // of class 0
  int64_t out_stride;                   // between classes, in the gradients
  A scale;                              // of the gradient

  A max{}, log_sum{}, inverse_sum{};

  // q without the term of the target class.
  __device__ A coefficient(int64_t c) const {
    A q = work.every;
    if (p.kind == TargetKind::probabilities) {
      q += widen(probabilities[c * p.probabilities.class_stride]) * work.of_target;
    }
    return p.weight ? q * widen(p.weight[c]) : q;
  }

  // max, log_sum, inverse_sum by one pass.
  __device__ void sum_exponentials() {
    constexpr A lowest = static_cast<A>(-INFINITY);
    A own_max = lowest;
    Sum own_sum = 0;
    for_each_pack(logits, group, [&](int64_t, const auto& pack) {
      constexpr int kSize = std::decay_t<decltype(pack)>::size;
      A pack_max = pack.at[0];
#pragma unroll
      for (int k = 1; k < kSize; ++k) pack_max = Max()(pack_max, pack.at[k]);
      if (pack_max > own_max) {
        own_sum *= static_cast<Sum>(exp(own_max - pack_max));
        own_max = pack_max;
      }
      // Nothing but -inf and NaN so far: exp(x - max) would make NaN of both.
      const A shift = own_max == lowest ? A(0) : own_max;
      A pack_sum = 0;
#pragma unroll
      for (int k = 0; k < kSize; ++k) pack_sum += exp(pack.at[k] - shift);
      own_sum += static_cast<Sum>(pack_sum);
    });
    max = group.reduce(own_max, Max());
    if (own_max < max) own_sum *= static_cast<Sum>(exp(own_max - max));
    const A sum = static_cast<A>(group.reduce(own_sum, Add()));
    log_sum = log(sum);
    inverse_sum = 1 / sum;
  }

  template <class F>
  __device__ A sum_over_classes(const F& f) const {
    Sum sum = 0;
    for_each_pack(logits, group, [&](int64_t c, const auto& pack) {
#pragma unroll
      for (int k = 0; k < std::decay_t<decltype(pack)>::size; ++k) sum += static_cast<Sum>(f(c + k, pack.at[k]));
    });
    return static_cast<A>(group.reduce(sum, Add()));
  }

  __device__ A log_probability(A x) const { return (x - max) - log_sum; }

  __device__ A loss(int64_t t) const {
    A loss = 0;
    if (is_spread(p)) {
      loss = -sum_over_classes([&](int64_t c, A x) { return coefficient(c) * log_probability(x); });
    }
    if (p.kind == TargetKind::indices) {
      const A of_target = -log_probability(widen(logits.data[t * logits.stride])) * weight_of(p, t);
      loss = is_spread(p) ? work.of_target * of_target + loss : of_target;
    }
    return loss;
  }

  template <class F>
  __device__ void write_gradient(T* gradient, const F& f) const {
    const bool aligned_alike = elements_past_alignment(gradient) == elements_past_alignment(logits.data);
    for_each_pack(logits, group, [&](int64_t c, auto pack) {
      f(c, pack);
      if constexpr (std::decay_t<decltype(pack)>::size == 1) {
        narrow(pack.at[0], gradient[c * out_stride]);
      } else {  // whole packs are those of contiguous rows
        store_pack_global(gradient + c, pack, aligned_alike);
      }
    });
  }

  __device__ void gradient_of_index(int64_t t) const {
    const bool smoothed = is_spread(p);
    const A of_target = scale * work.of_target * weight_of(p, t);
    A of_all = of_target;
    if (smoothed) of_all += scale * sum_over_classes([&](int64_t c, A) { return coefficient(c); });
    const A factor = of_all * inverse_sum;
    write_gradient(grad_logits, [&](int64_t c, auto& pack) {
      constexpr int kSize = std::decay_t<decltype(pack)>::size;
      A exponentials[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        exponentials[k] = exp(pack.at[k] - max);
        pack.at[k] = exponentials[k] * factor;
        if (smoothed) pack.at[k] -= scale * coefficient(c + k);
      }
      if (t < c || t >= c + kSize) return;
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (c + k != t) continue;
        // Without smoothing from p - 1, so that it is not lost to rounding as p approaches 1.
        const A probability = exponentials[k] * inverse_sum;
        pack.at[k] =
            smoothed ? of_all * probability - scale * coefficient(t) - of_target : of_target * (probability - A(1));
      }
    });
  }

  __device__ void gradient_of_probabilities() const {
    if (grad_logits) {
      const A factor = scale * sum_over_classes([&](int64_t c, A) { return coefficient(c); });
      write_gradient(grad_logits, [&](int64_t c, auto& pack) {
#pragma unroll
        for (int k = 0; k < std::decay_t<decltype(pack)>::size; ++k) {
          pack.at[k] = factor * (exp(pack.at[k] - max) * inverse_sum) - scale * coefficient(c + k);
        }
      });
    }
    if (grad_probabilities) {
      const A factor = -scale * work.of_target;
      write_gradient(grad_probabilities, [&](int64_t c, auto& pack) {
        for (int k = 0; k < std::decay_t<decltype(pack)>::size; ++k) {
          pack.at[k] = factor * log_probability(pack.at[k]) * weight_of(p, c + k);
        }
      });
    }
  }

  // Forward, backward or both. The group's first thread adds to the sums.
  __device__ void run(Sums<T>& sums) {
    const bool indexed = p.kind == TargetKind::indices;
    const int64_t t = indexed ? checked_target(p, index) : 0;
    if (indexed && t == p.ignore_index) {
      if (group.rank() == 0 && work.forward) write_forward(A(0), A(0), A(0));
      if (grad_logits) {
        write_gradient(grad_logits, [](int64_t, auto& pack) {
          for (int k = 0; k < std::decay_t<decltype(pack)>::size; ++k) pack.at[k] = A(0);
        });
      }
      return;
    }
    if (work.forward) {
      sum_exponentials();
      const A position_loss = loss(t);
      if (group.rank() == 0) {
        write_forward(position_loss, max, log_sum);
        sums.loss += static_cast<double>(position_loss);
        sums.weight += indexed ? static_cast<double>(weight_of(p, t)) : 1.0;
      }
    } else {
      max = work.position_max[index];
      log_sum = work.position_log_sum[index];
      inverse_sum = exp(-log_sum);
    }
    if (indexed && grad_logits) gradient_of_index(t);
    if (!indexed) gradient_of_probabilities();
  }

  __device__ void write_forward(A position_loss, A position_max, A position_log_sum) const {
    if (work.position_max) work.position_max[index] = position_max;
    if (work.position_log_sum) work.position_log_sum[index] = position_log_sum;
    if (p.reduction == Reduction::none && work.loss) narrow(position_loss, work.loss[index]);
  }
};

// The sum over a block's threads, in every one of them. scratch: shared.
template <class T>
__device__ Sums<T> reduce_block(const Sums<T>& sums, char* scratch) {
  const OneBlock block{scratch};
  return {block.reduce(sums.loss, Add()), block.reduce(sums.weight, Add())};
}

// What the positions that count weigh, as far as the grid's threads of this block see them.
template <class T>
__device__ Sums<T> count_targets(const CrossEntropyProblem<T>& p, char* scratch) {
  Sums<T> own;
  const int64_t n = p.batch * p.positions, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    const bool indexed = p.kind == TargetKind::indices;
    const int64_t t = indexed ? checked_target(p, i) : 0;
    if (!indexed) {
      own.weight += 1;
    } else if (t != p.ignore_index) {
      own.weight += static_cast<double>(weight_of(p, t));
    }
  }
  return reduce_block(own, scratch);
}

// The sum over all blocks, in every thread of the block that finishes last; false in the others. sums: the block's.
template <class T>
__device__ bool sum_in_last_block(const Work<T>& work, Sums<T>& sums, char* scratch) {
  if (gridDim.x == 1) return true;
  if (threadIdx.x == 0) {
    work.partial_sums[2 * blockIdx.x] = sums.loss;
    work.partial_sums[2 * blockIdx.x + 1] = sums.weight;
    __threadfence();
    *reinterpret_cast<unsigned*>(scratch) = atomicAdd(work.counter, 1u);
  }
  __syncthreads();
  const bool last = *reinterpret_cast<unsigned*>(scratch) == gridDim.x - 1;
  __syncthreads();
  if (!last) return false;
  __threadfence();
  Sums<T> own;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
    own.loss += __ldcg(work.partial_sums + 2 * i);
    own.weight += __ldcg(work.partial_sums + 2 * i + 1);
  }
  sums = reduce_block(own, scratch);
  return true;
}

template <class T>
__device__ void finish_forward(const Work<T>& work, Sums<T> sums, char* scratch) {
  using A = ComputeType<T>;
  const bool reduced = work.problem.reduction != Reduction::none && (work.loss || work.loss_place);
  if (!work.forward || (!work.total_weight && !reduced)) return;
  sums = reduce_block(sums, scratch);
  if (!sum_in_last_block(work, sums, scratch) || threadIdx.x != 0) return;
  if (work.total_weight) *work.total_weight = static_cast<A>(sums.weight);
  if (!reduced) return;
  const double divisor = work.loss_divisor ? static_cast<double>(*work.loss_divisor) : sums.weight;
  const double loss = work.problem.reduction == Reduction::mean ? sums.loss / divisor : sums.loss;
  narrow(static_cast<A>(loss), work.loss_place ? **work.loss_place : *work.loss);
}

// What multiplies the gradient of every position's loss, but for Reduction::none.
template <class T>
__device__ ComputeType<T> scale_of_all(const Work<T>& work, char* scratch) {
  using A = ComputeType<T>;
  if (!work.grad_logits && !work.grad_probabilities) return A(0);
  const bool mean = work.problem.reduction == Reduction::mean;
  A divisor = 1;
  if (mean && work.mean_divisor) {
    divisor = *work.mean_divisor;
  } else if (mean && work.problem.kind == TargetKind::probabilities) {
    divisor = static_cast<A>(static_cast<double>(work.problem.batch * work.problem.positions));
  } else if (mean) {
    divisor = static_cast<A>(count_targets(work.problem, scratch).weight);
  }
  const bool of_all = work.problem.reduction != Reduction::none && work.grad_output;
  return (of_all ? widen(*work.grad_output) : A(1)) / divisor;
}

// scale: of the gradient, but for Reduction::none.
template <class T, class Group>
__device__ Position<T, Group> position_at(const Work<T>& work, const Group& group, int64_t index,
                                          ComputeType<T> scale) {
  const CrossEntropyProblem<T>& p = work.problem;
  const int64_t b = index / p.positions, s = index % p.positions, out = b * p.classes * p.positions + s;
  if (p.reduction == Reduction::none && work.grad_output) {
    scale = widen(work.grad_output[index * work.grad_output_stride]);
  }
  return {.work = work,
          .p = p,
          .group = group,
          .index = index,
          .logits = {p.logits.data + b * p.logits.batch_stride + s, p.logits.class_stride, p.classes},
          .probabilities = p.probabilities.data + b * p.probabilities.batch_stride + s,
          .grad_logits = work.grad_logits ? work.grad_logits + out : nullptr,
          .grad_probabilities = work.grad_probabilities ? work.grad_probabilities + out : nullptr,
          .out_stride = p.positions,
          .scale = scale};
}

// One launch of its own, where the mean's divisor must be known before the first gradient.
template <class T>
__global__ void __launch_bounds__(kMostCrossEntropyThreads, 1) count_kernel(const Work<T> work) {
  if (work.has_nothing_to_do()) return;
  char* scratch = shared_memory();
  Sums<T> sums = count_targets(work.problem, scratch);
  if (sum_in_last_block(work, sums, scratch) && threadIdx.x == 0) {
    *work.total_weight = static_cast<ComputeType<T>>(sums.weight);
  }
}

// Rows of a few classes: a thread each. The block's rows travel between memory and shared memory coalesced, however few
// bytes one row has. pitch: elements between rows in shared memory.
template <class T>
__global__ void __launch_bounds__(kMostCrossEntropyThreads, 1) short_rows_kernel(const Work<T> work, int pitch) {
  if (work.has_nothing_to_do()) return;
  const CrossEntropyProblem<T>& p = work.problem;
  char* scratch = shared_memory();
  T* tile = reinterpret_cast<T*>(scratch + OneBlock::kScratchBytes);
  const ComputeType<T> scale = scale_of_all(work, scratch);
  const int classes = static_cast<int>(p.classes);
  Sums<T> sums;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x; first < p.batch;
       first += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int rows = static_cast<int>(p.batch - first < blockDim.x ? p.batch - first : blockDim.x);
    const int elements = rows * classes;
    const T* logits = p.logits.data + first * p.logits.batch_stride;
    T* gradient = work.grad_logits ? work.grad_logits + first * classes : nullptr;
    for (int i = threadIdx.x; i < elements; i += blockDim.x) {
      const int row = i / classes, c = i % classes;
      tile[row * pitch + c] = logits[row * p.logits.batch_stride + c];
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < rows) {
      const OneThread thread;
      auto position = position_at(work, thread, first + threadIdx.x, scale);
      T* row = tile + threadIdx.x * pitch;
      position.logits.data = row;
      if (gradient) position.grad_logits = row;  // each element takes the place of its logit
      position.run(sums);
    }
    __syncthreads();
    for (int i = threadIdx.x; gradient && i < elements; i += blockDim.x) {
      gradient[i] = tile[i / classes * pitch + i % classes];
    }
    __syncthreads();  // before the next rows
  }
  finish_forward(work, sums, scratch);
}

// A group of threads for each position. Where classes are not contiguous that is a thread, so that a warp's reads are
// coalesced.
template <class T, class Group>
__global__ void __launch_bounds__(kMostCrossEntropyThreads, 1) positions_kernel(const Work<T> work) {
  if (work.has_nothing_to_do()) return;
  char* scratch = shared_memory();
  const Group group = Group::in(scratch);
  const ComputeType<T> scale = scale_of_all(work, scratch);
  Sums<T> sums;
  const int64_t n = work.problem.batch * work.problem.positions;
  const int64_t first = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / group.size();
  const int64_t groups = int64_t{gridDim.x} * blockDim.x / group.size();
  for (int64_t i = first; i < n; i += groups) position_at(work, group, i, scale).run(sums);
  finish_forward(work, sums, scratch);
}

}  // namespace mnist_ext::cuda
