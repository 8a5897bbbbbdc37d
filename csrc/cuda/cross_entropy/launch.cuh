// Which kernel of softmax cross-entropy runs for which shape, with how many threads. Loss and gradient come in one
// pass: the row stays in shared memory (of one block, or of a cluster of blocks) between the sum of its exponentials
// and its gradient. Rows that are too long for that are read twice.
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
inline constexpr int64_t kWarpRowBytes = 8 << 10;
inline constexpr int64_t kBlockRowBytes = 64 << 10;  // of one block's share: two blocks at once on an A100 or later
inline constexpr int64_t kAlignmentBytes = 16;

inline unsigned blocks_for(int64_t work, int64_t work_of_block, bool one_block) {
  if (one_block) return 1;
  const int64_t blocks = (work + work_of_block - 1) / work_of_block;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > kMaxBlocks ? kMaxBlocks : blocks);
}

inline int64_t with_room_for_alignment(int64_t bytes) {
  return (bytes + 2 * kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
}

template <class T>
void launch_short_rows(const Work<T>& work, bool one_block, cudaStream_t stream) {
  const bool plain = is_plain(work.problem);
  const int classes = static_cast<int>(work.problem.classes);
  // Rows that are a multiple of 16 bytes apart would share a few of the memory's banks.
  const int pitch = classes % 4 == 0 ? classes + 1 : classes;
  const Shape shape = {blocks_for(work.problem.batch, kShortRowsThreads, one_block), kShortRowsThreads, 1,
                       OneBlock::kScratchBytes + static_cast<int64_t>(kShortRowsThreads * pitch * sizeof(T))};
  launch("cross_entropy short_rows", (plain ? short_rows_kernel<T, true> : short_rows_kernel<T, false>), shape, stream,
         work, pitch);
}

// stash_bytes: of each group of a block; 0: rows are read again.
template <class Group, class T>
void launch_rows(const char* name, const Work<T>& work, unsigned blocks, unsigned threads, unsigned cluster,
                 int64_t stash_bytes, cudaStream_t stream) {
  const int64_t groups = std::is_same_v<Group, OneWarp> ? threads / kWarp : 1;
  const Shape shape = {blocks, threads, cluster, Group::kScratchBytes + groups * stash_bytes};
  launch(name, (is_plain(work.problem) ? rows_kernel<T, Group, true> : rows_kernel<T, Group, false>), shape, stream,
         work, static_cast<int>(stash_bytes));
}

template <class T>
void launch_warp_rows(const Work<T>& work, bool one_block, int64_t row_bytes, bool read_twice, cudaStream_t stream) {
  constexpr int64_t kWarps = 4, kStashesBytes = 40 << 10;
  const int64_t warps = one_block ? OneWarp::kMaxThreads / kWarp : kWarps;
  const int64_t stash_bytes = read_twice ? with_room_for_alignment(row_bytes) : 0;
  launch_rows<OneWarp>("cross_entropy warp_rows", work, blocks_for(work.problem.batch, warps, one_block),
                       static_cast<unsigned>(warps * kWarp), 1, stash_bytes * warps > kStashesBytes ? 0 : stash_bytes,
                       stream);
}

template <class T>
void launch_long_rows(const Work<T>& work, bool one_block, int64_t row_bytes, bool read_twice, cudaStream_t stream) {
  constexpr unsigned kMaxCluster = 8;  // what every device with clusters can do
  const int64_t rows = work.problem.batch;
  const int64_t room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - OneCluster::kScratchBytes;
  const auto stash_for = [&](int64_t bytes) {
    const int64_t stash_bytes = read_twice ? with_room_for_alignment(bytes) : 0;
    return stash_bytes > room ? 0 : stash_bytes;
  };
  if (row_bytes > kBlockRowBytes && !one_block && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9) {
    unsigned cluster = 2;
    while (cluster < kMaxCluster && row_bytes > cluster * kBlockRowBytes) cluster *= 2;
    // A share is rounded up to 128 elements.
    const int64_t share = (row_bytes + cluster - 1) / cluster + 128 * static_cast<int64_t>(sizeof(T));
    const int64_t clusters = rows < kMaxBlocks / cluster ? rows : kMaxBlocks / cluster;
    return launch_rows<OneCluster>("cross_entropy cluster_rows", work,
                                   static_cast<unsigned>((clusters < 1 ? 1 : clusters) * cluster),
                                   OneCluster::kMaxThreads, cluster, stash_for(share), stream);
  }
  const unsigned threads = row_bytes <= 16 << 10 ? OneBlock::kMaxThreads / 2 : OneBlock::kMaxThreads;
  launch_rows<OneBlock>("cross_entropy block_rows", work, blocks_for(rows, 1, one_block), threads, 1,
                        stash_for(row_bytes), stream);
}

template <class T>
void launch_cross_entropy(const Work<T>& work, bool one_block, cudaStream_t stream) {
  const CrossEntropyProblem<T>& p = work.problem;
  const bool plain = is_plain(p);
  const bool read_twice = work.forward && (work.grad_logits || !plain);
  const int64_t row_bytes = p.classes * static_cast<int64_t>(sizeof(T));
  if (p.positions != 1) {
    const unsigned threads = kColumnsThreads;
    const Shape shape = {blocks_for(p.batch * p.positions, threads, one_block), threads, 1, OneBlock::kScratchBytes};
    launch("cross_entropy columns", (plain ? columns_kernel<T, true> : columns_kernel<T, false>), shape, stream, work);
  } else if (p.kind == TargetKind::indices && p.classes <= kShortRowClasses) {
    launch_short_rows(work, one_block, stream);
  } else if (row_bytes <= kWarpRowBytes) {
    launch_warp_rows(work, one_block, row_bytes, read_twice, stream);
  } else {
    launch_long_rows(work, one_block, row_bytes, read_twice, stream);
  }
}

template <class T>
ComputeType<T> smoothing_of_each(const CrossEntropyProblem<T>& p) {
  return p.label_smoothing > 0 ? static_cast<ComputeType<T>>(p.label_smoothing / static_cast<double>(p.classes)) : 0;
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
                  .loss = args.loss,
                  .loss_place = args.loss_place,
                  .grad_logits = args.grad_logits,
                  .grad_output = args.grad_output,
                  .unless_one = args.unless_one,
                  .every = smoothing_of_each(p),
                  .of_target = static_cast<ComputeType<T>>(1 - p.label_smoothing)};
  if (one_block) return launch_cross_entropy(work, true, stream);

  // The counter of each launch, then what the mean divides by.
  unsigned* counters = static_cast<unsigned*>(workspace);
  work.partial_sums = reinterpret_cast<double*>(static_cast<char*>(workspace) + 16);
  check(cudaMemsetAsync(counters, 0, 2 * sizeof *counters, stream), "cudaMemsetAsync");
  if (args.grad_logits && p.reduction == Reduction::mean && p.kind == TargetKind::indices) {
    Work<T> count = work;
    count.total_weight = reinterpret_cast<ComputeType<T>*>(counters + 2);
    count.counter = counters;
    const Shape shape = {blocks_for(p.batch * p.positions, 16 * kCountThreads, false), kCountThreads, 1,
                         OneBlock::kScratchBytes};
    launch("cross_entropy count", count_kernel<T>, shape, stream, count);
    work.mean_divisor = count.total_weight;
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
