// Which kernel makes which product, with which tiles, in how many splits of the depth.
#pragma once

#include "mma_launch.cuh"
#include "simt.cuh"
#include "wgmma_launch.cuh"

namespace mnist_ext::cuda {

// One way to make a product. A split is a part of the depth that blocks of its own sum.
struct SimtPlan {
  enum Tile { small, medium, large } tile;
  int splits;
  int64_t depth_of_split;
};

// What a tile costs, in cycles for each step of the depth: on a multiprocessor that is full of such blocks, and at
// least, for one that has no other to hide its waiting. By counting instructions, not by measuring.
struct TileCost {
  SimtPlan::Tile tile;
  int rows, columns, blocks_per_sm;
  double step, step_alone;
};

template <class Tile>
constexpr TileCost tile_cost(SimtPlan::Tile tile, double share_of_peak, double step_alone) {
  constexpr double kMultipliers = 128;  // of a multiprocessor; half as many for double, and half as deep a step
  constexpr double kStepDepth = SharedTile<float, Tile::kRows, Major::outer>::kDepth;
  return {tile,
          Tile::kRows,
          Tile::kColumns,
          Tile::kBlocksPerSm,
          Tile::kRows * Tile::kColumns * kStepDepth / kMultipliers / share_of_peak,
          step_alone};
}

inline constexpr TileCost kTileCosts[] = {tile_cost<SmallTile>(SimtPlan::small, 0.5, 450),
                                          tile_cost<MediumTile<float>>(SimtPlan::medium, 0.75, 900),
                                          tile_cost<LargeTile>(SimtPlan::large, 0.9, 2500)};

// Of those tiles that are compiled for T. Half dtypes come here only where tensor cores cannot help.
template <class T>
inline constexpr int kTiles = sizeof(T) == 2   ? 1
                              : sizeof(T) == 4 ? 3
                                               : 2;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The cheapest plan. It depends on sizes and device alone, and so does the order of summation.
template <class T>
SimtPlan simt_plan(int64_t rows, int64_t columns, int64_t depth) {
  constexpr double kBlock = 1500;         // cycles for the first copies to arrive, and for the results to leave
  constexpr double kSecondKernel = 3000;  // which adds the splits
  constexpr double kBytesPerCycle = 16;   // of a multiprocessor, to and from the L2 cache
  constexpr int64_t kMaxSplits = 64;
  const int64_t step_depth = SharedTile<ComputeType<T>, 32, Major::outer>::kDepth, steps = ceil_div(depth, step_depth);
  const double multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  SimtPlan best{};
  double best_cycles = 0;
  for (int i = 0; i < kTiles<T>; ++i) {
    const TileCost& cost = kTileCosts[i];
    const double tiles =
        static_cast<double>(ceil_div(rows, cost.rows) * ceil_div(columns < 1 ? 1 : columns, cost.columns));
    for (int64_t parts = 1; parts <= kMaxSplits && (parts == 1 || parts <= steps); parts *= 2) {
      const int64_t steps_of_split = steps == 0 ? 1 : ceil_div(steps, parts);
      const int64_t splits = steps == 0 ? 1 : ceil_div(steps, steps_of_split);
      const double blocks = std::ceil(tiles * static_cast<double>(splits) / multiprocessors);  // of the busiest one
      const double full = blocks * cost.step, alone = std::ceil(blocks / cost.blocks_per_sm) * cost.step_alone;
      double cycles = static_cast<double>(steps_of_split) * (full > alone ? full : alone) + kBlock;
      if (splits > 1) {
        const double bytes = 2.0 * static_cast<double>(splits * rows * columns) * sizeof(ComputeType<T>);
        cycles += kSecondKernel + bytes / (kBytesPerCycle * multiprocessors);
      }
      if (best_cycles != 0 && cycles >= best_cycles) continue;
      best_cycles = cycles;
      best = {cost.tile, static_cast<int>(splits), steps_of_split * step_depth};
    }
  }
  return best;
}

template <class T>
Major major_of(const Operand<T>& operand, int64_t outer) {
  if (operand.k_stride == 1 || outer <= 1) return Major::depth;
  if (operand.outer_stride == 1) return Major::outer;
  return std::abs(operand.k_stride) <= std::abs(operand.outer_stride) ? Major::depth : Major::outer;
}

// Whether 16 bytes at a time can be copied along the major index.
template <class T>
bool is_vector(const Operand<T>& operand, Major major, int64_t outer, int64_t depth) {
  if (sizeof(T) != sizeof(ComputeType<T>)) return false;  // every element has to be widened
  const bool along_depth = major == Major::depth;
  const int64_t along = along_depth ? operand.k_stride : operand.outer_stride;
  const int64_t across = along_depth ? operand.outer_stride : operand.k_stride;
  const int64_t rows = along_depth ? outer : depth;
  return along == 1 && reinterpret_cast<uintptr_t>(operand.data) % 16 == 0 &&
         (rows <= 1 || across * static_cast<int64_t>(sizeof(T)) % 16 == 0);
}

template <class T, class Tile, Major kMajorA, Major kMajorB>
void launch_simt(SimtWork<T>& work, cudaStream_t stream) {
  using S = ComputeType<T>;
  work.row_tiles = static_cast<unsigned>(ceil_div(work.product.M, Tile::kRows));
  const int64_t columns = work.product.N;
  work.column_tiles = static_cast<unsigned>(columns < 1 ? 1 : ceil_div(columns, Tile::kColumns));
  const unsigned blocks = work.row_tiles * work.column_tiles * static_cast<unsigned>(work.splits);
  constexpr int kA = SharedTile<S, Tile::kRows, kMajorA>::kSize, kB = SharedTile<S, Tile::kColumns, kMajorB>::kSize;
  const int64_t stage_bytes = (kA + kB + (work.product.relu_mask.data ? kA : 0)) * static_cast<int64_t>(sizeof(S));
  const int64_t bytes = kStages * stage_bytes + (work.product.row_sums ? Tile::kRows * sizeof(double) : 0);
  launch("linear simt", linear_simt_kernel<T, Tile, kMajorA, kMajorB>, Shape{blocks, Tile::kThreads, 1, bytes}, stream,
         work);
}

template <class T, class Tile>
void launch_simt(SimtWork<T>& work, Major a, Major b, cudaStream_t stream) {
  if (a == Major::depth) {
    if (b == Major::depth) return launch_simt<T, Tile, Major::depth, Major::depth>(work, stream);
    return launch_simt<T, Tile, Major::depth, Major::outer>(work, stream);
  }
  if (b == Major::depth) return launch_simt<T, Tile, Major::outer, Major::depth>(work, stream);
  launch_simt<T, Tile, Major::outer, Major::outer>(work, stream);
}

// A row of partial sums begins at a multiple of 16 bytes.
template <class T>
int64_t partial_pitch(const Product<T>& p) {
  constexpr int64_t kVector = 16 / sizeof(ComputeType<T>);
  return p.c ? ceil_div(p.N, kVector) * kVector : 0;
}

template <class T>
int64_t partial_bytes(const Product<T>& p, int splits) {
  return splits * p.M * partial_pitch(p) * static_cast<int64_t>(sizeof(ComputeType<T>));
}

template <class T>
int64_t simt_workspace_bytes(const Product<T>& p) {
  const int splits = simt_plan<T>(p.M, p.c ? p.N : 0, p.K).splits;
  if (splits == 1) return 0;
  return partial_bytes(p, splits) + (p.row_sums ? splits * p.M * static_cast<int64_t>(sizeof(double)) : 0);
}

template <class T>
void simt_product(const Product<T>& product, void* workspace, cudaStream_t stream) {
  Product<T> p = product;
  if (!p.c) p.N = 0;
  if (p.M == 0 || (p.N == 0 && !p.row_sums)) return;
  const SimtPlan plan = simt_plan<T>(p.M, p.N, p.K);
  const Major a = major_of(p.a, p.M), b = major_of(p.b, p.N);
  SimtWork<T> work{};
  work.product = p;
  work.vector_a = is_vector(p.a, a, p.M, p.K) && (!p.relu_mask.data || is_vector(p.relu_mask, a, p.M, p.K));
  work.vector_b = is_vector(p.b, b, p.N, p.K);
  work.vector_out = reinterpret_cast<uintptr_t>(p.c) % 16 == 0 && p.N % kPack<T> == 0;
  work.depth_of_split = plan.depth_of_split;
  work.splits = plan.splits;
  work.pitch = partial_pitch(product);
  work.partial = static_cast<ComputeType<T>*>(workspace);
  work.partial_row_sums =
      reinterpret_cast<double*>(static_cast<char*>(workspace) + partial_bytes(product, plan.splits));
  // The tile makes no difference to the results' bits: only the splits do.
  if (kTiles<T> > SimtPlan::large && plan.tile == SimtPlan::large && work.vector_a && work.vector_b) {
    if constexpr (kTiles<T> > SimtPlan::large) launch_simt<T, LargeTile>(work, a, b, stream);
  } else if (kTiles<T> > SimtPlan::medium && plan.tile >= SimtPlan::medium) {
    if constexpr (kTiles<T> > SimtPlan::medium) launch_simt<T, MediumTile<ComputeType<T>>>(work, a, b, stream);
  } else {
    launch_simt<T, SmallTile>(work, a, b, stream);
  }
  if (plan.splits == 1) return;
  constexpr int64_t kVector = 16 / sizeof(ComputeType<T>);
  const int64_t threads = p.M * (work.pitch / kVector) + (p.row_sums ? p.M : 0);
  launch("linear reduce_splits", reduce_splits_kernel<T>,
         Shape{static_cast<unsigned>(ceil_div(threads, kReduceThreads)), kReduceThreads}, stream, work);
}

template <class T>
int64_t product_workspace_bytes(const Product<T>& p) {
  if constexpr (sizeof(T) <= 4) {
    if (wgmma_takes(p)) return wgmma_workspace_bytes(p);
    if (mma_takes(p)) return mma_workspace_bytes(p);
  }
  return simt_workspace_bytes(p);
}

template <class T>
void start_product(const Product<T>& p, void* workspace, cudaStream_t stream) {
  if constexpr (sizeof(T) <= 4) {
    if (wgmma_takes(p)) return wgmma_product(p, workspace, stream);
    if (mma_takes(p)) return mma_product(p, workspace, stream);
  }
  simt_product(p, workspace, stream);
}

}  // namespace mnist_ext::cuda
