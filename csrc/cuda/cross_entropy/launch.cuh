// Which kernel of softmax cross-entropy runs for which shape, with how many threads. Loss and gradient come in one
// launch, which reads a row twice: for the sum of its exponentials, and from the cache for its gradient.
//
// Sums of a row: in T's compute type over 16 bytes, then in double (float for a warp's rows); over positions in double,
// in an order that is fixed by the shape. No atomics but the counter by which the last block is known.
#pragma once

#include "kernel.cuh"

namespace mnist_ext::cuda {

// More would wait for the first ones anyway, and each leaves a partial sum behind. A constant, so that the order of the
// sums does not depend on the device.
inline constexpr int64_t kMaxBlocks = 2048;

// Up to here one block does everything, in one launch: no partial sums, no counting beforehand.
inline constexpr int64_t kSmallElements = 32768, kSmallPositions = 1024;

template <class T>
bool one_block_is_enough(const CrossEntropyProblem<T>& p) {
  const int64_t positions = p.batch * p.positions;
  return positions <= kSmallPositions && positions * p.classes <= kSmallElements;
}

// Two counters, what the mean divides by, and the partial sums.
template <class T>
int64_t cross_entropy_workspace_bytes(const CrossEntropyForward<T>& args) {
  if (one_block_is_enough(args.problem)) return 0;
  return 16 + kMaxBlocks * 2 * static_cast<int64_t>(sizeof(double));
}

inline constexpr int64_t kShortRowClasses = 32;

inline unsigned blocks_for(int64_t work, int64_t work_of_block, bool one_block) {
  if (one_block) return 1;
  const int64_t blocks = (work + work_of_block - 1) / work_of_block;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > kMaxBlocks ? kMaxBlocks : blocks);
}

template <class T>
void launch_short_rows(const Work<T>& work, bool one_block, cudaStream_t stream) {
  const int classes = static_cast<int>(work.problem.classes);
  // Rows that are a multiple of 16 bytes apart would share a few of the memory's banks.
  const int pitch = classes % 4 == 0 ? classes + 1 : classes;
  const unsigned threads = kCrossEntropyThreads;
  const Shape shape = {blocks_for(work.problem.batch, threads, one_block), threads,
                       OneBlock::kScratchBytes + static_cast<int64_t>(threads * pitch * sizeof(T))};
  launch("cross_entropy short_rows", short_rows_kernel<T>, shape, stream, work, pitch);
}

// Of a block: threads, and groups of them.
template <class Group, class T>
void launch_positions(const char* name, const Work<T>& work, bool one_block, unsigned threads, unsigned groups,
                      cudaStream_t stream) {
  const CrossEntropyProblem<T>& p = work.problem;
  const Shape shape = {blocks_for(p.batch * p.positions, groups, one_block), threads, OneBlock::kScratchBytes};
  launch(name, positions_kernel<T, Group>, shape, stream, work);
}

template <class T>
void launch_cross_entropy(const Work<T>& work, bool one_block, cudaStream_t stream) {
  constexpr int64_t kWarpRowBytes = 8 << 10;
  const CrossEntropyProblem<T>& p = work.problem;
  const unsigned threads = kCrossEntropyThreads;
  if (p.positions != 1) {
    launch_positions<OneThread>("cross_entropy columns", work, one_block, threads, threads, stream);
  } else if (p.kind == TargetKind::indices && p.classes <= kShortRowClasses) {
    launch_short_rows(work, one_block, stream);
  } else if (p.classes * static_cast<int64_t>(sizeof(T)) <= kWarpRowBytes) {
    launch_positions<OneWarp>("cross_entropy warp_rows", work, one_block, threads, threads / kWarp, stream);
  } else {
    launch_positions<OneBlock>("cross_entropy block_rows", work, one_block, kMostCrossEntropyThreads, 1, stream);
  }
}

template <class T>
ComputeType<T> smoothing_of_each(const CrossEntropyProblem<T>& p) {
  return p.label_smoothing > 0 ? static_cast<ComputeType<T>>(p.label_smoothing / static_cast<double>(p.classes)) : 0;
}

// What the targets weigh. The counter is 0.
template <class T>
void launch_count(Work<T> work, ComputeType<T>* total_weight, unsigned* counter, cudaStream_t stream) {
  work.total_weight = total_weight;
  work.counter = counter;
  const int64_t positions = work.problem.batch * work.problem.positions;
  const Shape shape = {blocks_for(positions, 16 * kCrossEntropyThreads, false), kCrossEntropyThreads,
                       OneBlock::kScratchBytes};
  launch("cross_entropy count", count_kernel<T>, shape, stream, work);
}

// As the kernel table has it.
template <class T>
void weigh_targets(const CrossEntropyProblem<T>& problem, ComputeType<T>* total_weight, void* workspace,
                   cudaStream_t stream) {
  static_assert(16 + kMaxBlocks * 2 * sizeof(double) <= kWeighTargetsBytes);
  Work<T> work = {.problem = problem, .forward = true};
  work.partial_sums = reinterpret_cast<double*>(static_cast<char*>(workspace) + 16);
  check(cudaMemsetAsync(workspace, 0, sizeof(unsigned), stream), "cudaMemsetAsync");
  launch_count(work, total_weight, static_cast<unsigned*>(workspace), stream);
}

template <class T>
void cross_entropy_forward(const CrossEntropyForward<T>& args, void* workspace, cudaStream_t stream) {
  const CrossEntropyProblem<T>& p = args.problem;
  const bool one_block = one_block_is_enough(p);
  Work<T> work = {.problem = p,
                  .forward = true,
                  .position_max = args.position_max,
                  .position_log_sum = args.position_log_sum,
                  .total_weight = args.total_weight,
                  .mean_divisor = args.divisor,
                  .loss_divisor = args.divisor,
                  .loss = args.loss,
                  .loss_place = args.loss_place,
                  .grad_logits = args.grad_logits,
                  .grad_output = args.grad_output,
                  .grad_output_stride = args.grad_output_stride,
                  .unless_one = args.unless_one,
                  .every = smoothing_of_each(p),
                  .of_target = static_cast<ComputeType<T>>(1 - p.label_smoothing)};
  if (one_block) return launch_cross_entropy(work, true, stream);

  // The counter of each launch, then what the mean divides by.
  unsigned* counters = static_cast<unsigned*>(workspace);
  work.partial_sums = reinterpret_cast<double*>(static_cast<char*>(workspace) + 16);
  check(cudaMemsetAsync(counters, 0, 2 * sizeof *counters, stream), "cudaMemsetAsync");
  if (args.grad_logits && !args.divisor && p.reduction == Reduction::mean && p.kind == TargetKind::indices) {
    ComputeType<T>* total_weight = reinterpret_cast<ComputeType<T>*>(counters + 2);
    launch_count(work, total_weight, counters, stream);
    work.mean_divisor = total_weight;
  }
  work.counter = counters + 1;
  launch_cross_entropy(work, false, stream);
}

template <class T>
void cross_entropy_backward(const CrossEntropyBackward<T>& args, cudaStream_t stream) {
  const CrossEntropyProblem<T>& p = args.problem;
  launch_cross_entropy<T>({.problem = p,
                           .forward = false,
                           .position_max = const_cast<ComputeType<T>*>(args.position_max),
                           .position_log_sum = const_cast<ComputeType<T>*>(args.position_log_sum),
                           .mean_divisor = args.total_weight,
                           .grad_logits = args.grad_logits,
                           .grad_probabilities = args.grad_probabilities,
                           .grad_output = args.grad_output,
                           .grad_output_stride = args.grad_output_stride,
                           .every = smoothing_of_each(p),
                           .of_target = static_cast<ComputeType<T>>(1 - p.label_smoothing)},
                          one_block_is_enough(p), stream);
}

}  // namespace mnist_ext::cuda
