// A product: which main loop makes it, with which tile, in how many splits of K, and its launches. What is decided
// depends on sizes, layouts and the device alone, and so does the order of summation.
#pragma once

#include <algorithm>

#include "simt.cuh"

namespace mnist_ext::cuda {

enum class MainLoop { simt, mma, wgmma };

struct TileSize {
  int M, N;
};

inline constexpr int kWgmmaStepBytes = 128;  // of K, in each step: a row of a box of the Tensor Memory Accelerator

struct MainLoopTraits {
  TileSize tiles[2];  // of C, of a block: the small one and the large one
  int step_bytes;     // of K
  int blocks_per_multiprocessor;
  int min_steps;  // of a split
};
inline constexpr MainLoopTraits kMainLoops[] = {
    {{{SmallTile::kM, SmallTile::kN}, {LargeTile<float>::kM, LargeTile<float>::kN}}, kStepBytes, 4, 4},
    {{{64, 64}, {128, 128}}, kStepBytes, 2, 8},
    {{{128, 128}, {128, 256}}, kWgmmaStepBytes, 1, 8}};

inline constexpr int64_t kMaxSplits = 64;

struct Plan {
  MainLoop main_loop;
  int tile;  // in the main loop's list
  Tiling tiling;
};

inline unsigned blocks_of(const Plan& plan) {
  return static_cast<unsigned>(plan.tiling.row_tiles * plan.tiling.column_tiles * plan.tiling.splits);
}

// The larger tile where that fills the device; else the smaller one, and where this does not fill it with so many
// blocks to a multiprocessor either, K is split. Tiles make no difference to the bits of simt's results: only the
// splits do.
template <class T>
Plan plan_for(MainLoop main_loop, const Product<T>& p) {
  const MainLoopTraits& traits = kMainLoops[static_cast<int>(main_loop)];
  const int64_t step_k = traits.step_bytes / sizeof(T), steps = ceil_div(p.K, step_k);
  const int64_t M = p.M < 1 ? 1 : p.M, N = !p.c || p.N < 1 ? 1 : p.N;  // row sums alone have no N
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  const bool large = ceil_div(M, traits.tiles[1].M) * ceil_div(N, traits.tiles[1].N) >= multiprocessors;
  const TileSize tile = traits.tiles[large];
  const int64_t row_tiles = ceil_div(M, tile.M), column_tiles = ceil_div(N, tile.N);
  const int64_t blocks = traits.blocks_per_multiprocessor * multiprocessors;
  const int64_t wanted = large ? 1 : blocks / (row_tiles * column_tiles);
  // In splits of whole steps, none of them empty.
  const int64_t splits = std::max<int64_t>(std::min({wanted, steps / traits.min_steps, kMaxSplits}), 1);
  const int64_t steps_of_split = std::max<int64_t>(ceil_div(steps, splits), 1);
  const Tiling tiling = {.row_tiles = static_cast<int>(row_tiles),
                         .column_tiles = static_cast<int>(column_tiles),
                         .splits = static_cast<int>(std::max<int64_t>(ceil_div(steps, steps_of_split), 1)),
                         .K = p.K,
                         .k_of_split = steps_of_split * step_k};
  return {main_loop, large, tiling};
}

// By wgmma.

// As the Tensor Memory Accelerator copies it: rows that begin at multiples of 16 bytes and do not overlap.
template <class T>
bool is_copied_in_boxes(const Operand<T>& operand, int64_t outer, int64_t K) {
  constexpr int64_t kMost = 0x7fffffff - 256, kMostBytes = int64_t{1} << 40;
  const bool by_k = major_of(operand) == Major::k;
  const int64_t unit = by_k ? operand.k_stride : operand.outer_stride, row_size = by_k ? K : outer;
  const int64_t stride = (by_k ? operand.outer_stride : operand.k_stride) * static_cast<int64_t>(sizeof(T));
  return unit == 1 && elements_past_alignment(operand.data) == 0 && stride % 16 == 0 && stride < kMostBytes &&
         stride >= row_size * static_cast<int64_t>(sizeof(T)) && outer <= kMost && K <= kMost;
}

// Whether A is read into registers first, where its mask and the sums of its rows can be had.
template <class T>
bool uses_fragments(const Product<T>& p) {
  return p.relu_mask.data || p.row_sums || major_of(p.a) == Major::outer;
}

// Whether there are kernels for these sizes and layouts.
template <class T>
bool wgmma_can(const Product<T>& p) {
  constexpr int64_t kLeast = 128;  // below, the smaller tiles of mma waste less
  if (!p.c || p.M < kLeast || p.N < kLeast || p.K < kLeast) return false;
  if (!is_copied_in_boxes(p.a, p.M, p.K)) return false;
  const Operand<T>& mask = p.relu_mask;
  if (mask.data && (!is_copied_in_boxes(mask, p.M, p.K) || major_of(mask) != major_of(p.a))) return false;
  if (!is_copied_in_boxes(p.b, p.N, p.K)) return false;
  // The tensor cores read floats along K only, and what is compiled with fragments are a layer's gradients.
  if (sizeof(T) == 4) return !uses_fragments(p) && major_of(p.b) == Major::k;
  return !uses_fragments(p) || major_of(p.b) == Major::outer;
}

// What tensor cores have kernels for, compiled in files of their own.
template <class T>
bool has_wgmma();
template <class T>
void launch_mma(const Product<T>& product, const Plan& plan, const Epilogue<T>& epilogue, cudaStream_t stream);
template <class T>
void launch_wgmma(const Product<T>& product, const Plan& plan, const Epilogue<T>& epilogue, cudaStream_t stream);

template <class T>
MainLoop main_loop_for(const Product<T>& p) {
  const bool tensor_cores = (sizeof(T) == 2 || (sizeof(T) == 4 && p.allow_tf32)) && p.c && p.M > 0 && p.N > 0;
  if constexpr (sizeof(T) <= 4) {
    if (!tensor_cores) return MainLoop::simt;
    if (wgmma_can(p) && has_wgmma<T>()) return MainLoop::wgmma;
    if (device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8) return MainLoop::mma;
  }
  return MainLoop::simt;
}

template <class T>
TiledWork<T> tiled_work(const Product<T>& product, const Plan& plan, const Epilogue<T>& epilogue, Major a, Major b) {
  return {.a = source_of(product.a, a),
          .relu_mask = source_of(product.relu_mask, a),
          .b = source_of(product.b, b),
          .tiling = plan.tiling,
          .epilogue = epilogue};
}

template <class T>
void launch_simt(const Product<T>& product, const Plan& plan, const Epilogue<T>& epilogue, cudaStream_t stream) {
  const auto start = [&]<class Tile, Major kMajorA, Major kMajorB>() {
    const TiledWork<T> work = tiled_work(product, plan, epilogue, kMajorA, kMajorB);
    const bool masked = product.relu_mask.data != nullptr, sums_rows = product.row_sums != nullptr;
    launch("product simt", product_simt_kernel<T, Tile, kMajorA, kMajorB>,
           Shape{blocks_of(plan), kTileThreads, SimtKernel<T, Tile, kMajorA, kMajorB>::shared_bytes(masked, sums_rows)},
           stream, work);
  };
  const auto start_tile = [&]<Major kMajorA, Major kMajorB>() {
    if (plan.tile == 0) return start.template operator()<SmallTile, kMajorA, kMajorB>();
    start.template operator()<LargeTile<T>, kMajorA, kMajorB>();
  };
  if constexpr (sizeof(T) == 2) {
    start_tile.template operator()<Major::k, Major::k>();
  } else {
    with_majors(major_of(product.a), major_of(product.b), start_tile);
  }
}

template <class T>
int64_t product_workspace_bytes(const Product<T>& p, MainLoop main_loop) {
  return epilogue_workspace_bytes(p, plan_for(main_loop, p).tiling.splits);
}

template <class T>
int64_t product_workspace_bytes(const Product<T>& p) {
  return product_workspace_bytes(p, main_loop_for(p));
}

template <class T>
void start_product(const Product<T>& p, MainLoop main_loop, void* workspace, cudaStream_t stream) {
  if (p.M == 0 || ((!p.c || p.N == 0) && !p.row_sums)) return;
  const Plan plan = plan_for(main_loop, p);
  const Epilogue<T> epilogue = epilogue_of(p, plan.tiling.splits, workspace);
  if constexpr (sizeof(T) <= 4) {
    if (main_loop == MainLoop::mma) launch_mma(p, plan, epilogue, stream);
    if (main_loop == MainLoop::wgmma) launch_wgmma(p, plan, epilogue, stream);
  }
  if (main_loop == MainLoop::simt) launch_simt(p, plan, epilogue, stream);
  reduce_splits(epilogue, stream);
}

template <class T>
void start_product(const Product<T>& p, void* workspace, cudaStream_t stream) {
  start_product(p, main_loop_for(p), workspace, stream);
}

}  // namespace mnist_ext::cuda
