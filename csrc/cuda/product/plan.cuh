// A product: which main loop makes it, with which tile, in how many splits of K, and its launches. What is decided
// depends on sizes, layouts and the device alone, and so does the order of summation.
#pragma once

#include <iterator>

#include "simt.cuh"

namespace mnist_ext::cuda {

enum class MainLoop { simt, mma, wgmma };

// Of a block: C's, by main loop, from small to large.
struct TileSize {
  int M, N;
};
inline constexpr TileSize kSimtTiles[] = {{32, 64}, {64, 64}, {128, 128}};
inline constexpr TileSize kMmaTiles[] = {{64, 64}, {128, 128}};
inline constexpr TileSize kWgmmaTiles[] = {{128, 128}, {128, 256}};

inline constexpr int64_t kMaxSplits = 64;
inline constexpr int kWgmmaStepBytes = 128;  // of K, in each step: a row of a box of the Tensor Memory Accelerator

struct Plan {
  MainLoop main_loop;
  int tile;  // in the main loop's list
  Tiling tiling;
  unsigned cluster = 1;  // blocks whose tiles lie above each other; tiling counts them as one
};

inline unsigned blocks_of(const Plan& plan) {
  return static_cast<unsigned>(plan.tiling.row_tiles * plan.tiling.column_tiles * plan.tiling.splits) * plan.cluster;
}

// In splits of whole steps, none of them empty.
inline Tiling tiling_of(int64_t row_tiles, int64_t column_tiles, int64_t K, int64_t step_k, int64_t splits) {
  const int64_t steps = ceil_div(K, step_k), of_split = steps == 0 ? 1 : ceil_div(steps, splits < 1 ? 1 : splits);
  return {.row_tiles = static_cast<int>(row_tiles),
          .column_tiles = static_cast<int>(column_tiles),
          .splits = static_cast<int>(steps == 0 ? 1 : ceil_div(steps, of_split)),
          .K = K,
          .k_of_split = of_split * step_k};
}

// Tensor cores: the larger tile where that fills the device; else the smaller one, and where this does not fill it with
// so many blocks to a multiprocessor either, K is split.
inline Plan plan_for_tensor_cores(MainLoop main_loop, int64_t M, int64_t N, int64_t K, const TileSize (&tiles)[2],
                                  int64_t step_k, int blocks_per_multiprocessor) {
  constexpr int64_t kMinSteps = 8;     // of a split
  constexpr int64_t kFewRowTiles = 8;  // of which a cluster would waste too much if they are odd
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  const bool large = ceil_div(M, tiles[1].M) * ceil_div(N, tiles[1].N) >= multiprocessors;
  const TileSize tile = tiles[large];
  int64_t row_tiles = ceil_div(M, tile.M);
  const bool pairs = main_loop == MainLoop::wgmma && (row_tiles % 2 == 0 || row_tiles > kFewRowTiles);
  const int64_t cluster = pairs ? 2 : 1, column_tiles = ceil_div(N, tile.N);
  row_tiles = ceil_div(row_tiles, cluster);
  int64_t splits = large ? 1 : blocks_per_multiprocessor * multiprocessors / (row_tiles * cluster * column_tiles);
  if (splits > ceil_div(K, step_k) / kMinSteps) splits = ceil_div(K, step_k) / kMinSteps;
  if (splits > kMaxSplits) splits = kMaxSplits;
  return {main_loop, large, tiling_of(row_tiles, column_tiles, K, step_k, splits), static_cast<unsigned>(cluster)};
}

// What a tile of simt costs, in cycles for each step of K: on a multiprocessor that is full of such blocks, and at
// least, for one that has no other to hide its waiting. By counting instructions, not by measuring.
struct SimtCost {
  int blocks_per_sm;
  double step, step_alone;
};

template <class Tile>
constexpr SimtCost simt_cost(double share_of_peak, double step_alone) {
  constexpr double kMultipliers = 128;  // of a multiprocessor; half as many for double, and half as deep a step
  constexpr double kStep = kStepBytes / sizeof(float);
  return {Tile::kBlocksPerSm, Tile::kM * Tile::kN * kStep / kMultipliers / share_of_peak, step_alone};
}

inline constexpr SimtCost kSimtCosts[] = {simt_cost<SmallTile>(0.5, 450), simt_cost<MediumTile<float>>(0.75, 900),
                                          simt_cost<LargeTile>(0.9, 2500)};

// Of those tiles that are compiled for T.
template <class T>
inline constexpr int kSimtTilesOf = sizeof(T) == 2   ? 1
                                    : sizeof(T) == 4 ? 3
                                                     : 2;

// Half dtypes have one layout.
template <class T>
Major simt_major_of(const Operand<T>& operand) {
  return sizeof(T) == 2 ? Major::k : major_of(operand);
}

// The large tile has no code for other copies than of 16 bytes.
template <class T>
bool takes_large_simt_tile(const Product<T>& p) {
  const Major a = simt_major_of(p.a), b = a == Major::outer ? a : simt_major_of(p.b);
  return source_of(p.a, a).copy_bytes == kChunk && source_of(p.b, b).copy_bytes == kChunk &&
         (!p.relu_mask.data || source_of(p.relu_mask, a).copy_bytes == kChunk);
}

// The cheapest. Tiles make no difference to the bits of the results: only the splits do.
template <class T>
Plan plan_for_simt(const Product<T>& p) {
  constexpr double kBlock = 1500;         // cycles for the first copies to arrive, and for the results to leave
  constexpr double kSecondKernel = 3000;  // which adds the splits
  constexpr double kBytesPerCycle = 16;   // of a multiprocessor, to and from the L2 cache
  const int64_t N = p.c ? p.N : 0, columns = N < 1 ? 1 : N;  // row sums alone
  const int64_t step_k = kStepBytes / sizeof(ComputeType<T>), steps = ceil_div(p.K, step_k);
  const double multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  Plan best{};
  double best_cycles = 0;
  for (int tile = 0; tile < kSimtTilesOf<T>; ++tile) {
    const SimtCost& cost = kSimtCosts[tile];
    const int64_t row_tiles = ceil_div(p.M, kSimtTiles[tile].M), column_tiles = ceil_div(columns, kSimtTiles[tile].N);
    for (int64_t splits = 1; splits <= kMaxSplits && (splits == 1 || splits <= steps); splits *= 2) {
      const Tiling tiling = tiling_of(row_tiles, column_tiles, p.K, kStepBytes / sizeof(T), splits);
      const double tiles = static_cast<double>(row_tiles * column_tiles * tiling.splits);
      const double blocks = std::ceil(tiles / multiprocessors);  // of the busiest multiprocessor
      const double full = blocks * cost.step, alone = std::ceil(blocks / cost.blocks_per_sm) * cost.step_alone;
      double cycles = static_cast<double>(ceil_div(tiling.k_of_split, step_k)) * (full > alone ? full : alone) + kBlock;
      if (tiling.splits > 1) {
        const double bytes = 2.0 * static_cast<double>(tiling.splits * p.M * N) * sizeof(ComputeType<T>);
        cycles += kSecondKernel + bytes / (kBytesPerCycle * multiprocessors);
      }
      if (best_cycles != 0 && cycles >= best_cycles) continue;
      best_cycles = cycles;
      best = {MainLoop::simt, tile, tiling};
    }
  }
  if (best.tile == 2 && !takes_large_simt_tile(p)) {
    best.tile = 1;
    best.tiling.row_tiles = static_cast<int>(ceil_div(p.M, kSimtTiles[1].M));
    best.tiling.column_tiles = static_cast<int>(ceil_div(columns, kSimtTiles[1].N));
  }
  return best;
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

// Whether B is copied first, so that it lies along K: the tensor cores read floats no other way.
template <class T>
bool transposes_b(const Product<T>& p) {
  return sizeof(T) == 4 && major_of(p.b) == Major::outer;
}

// B as the tensor cores read it, whose rows begin at multiples of 16 bytes.
template <class T>
Operand<T> transposed_b(const Product<T>& p, const void* copy) {
  return {static_cast<const T*>(copy), ceil_div(p.K, kPack<T>) * kPack<T>, 1};
}

template <class T>
int64_t transposed_bytes(const Product<T>& p) {
  return transposes_b(p) ? p.N * transposed_b(p, nullptr).outer_stride * static_cast<int64_t>(sizeof(T)) : 0;
}

// Whether there are kernels for these sizes and layouts.
template <class T>
bool wgmma_can(const Product<T>& p) {
  constexpr int64_t kLeast = 128;  // below, the smaller tiles of mma waste less
  if (!p.c || p.M < kLeast || p.N < kLeast || p.K < kLeast) return false;
  if (!is_copied_in_boxes(p.a, p.M, p.K)) return false;
  const Operand<T>& mask = p.relu_mask;
  if (mask.data && (!is_copied_in_boxes(mask, p.M, p.K) || major_of(mask) != major_of(p.a))) return false;
  if (transposes_b(p)) return is_copied_in_boxes(transposed_b(p, nullptr), p.N, p.K);
  if (!is_copied_in_boxes(p.b, p.N, p.K)) return false;
  // Of the half dtypes' layouts with fragments only those of a layer's gradients are compiled.
  return sizeof(T) == 4 || !uses_fragments(p) || major_of(p.b) == Major::outer;
}

// What tensor cores have kernels for, compiled in files of their own.
template <class T>
bool has_wgmma();
template <class T>
void launch_mma(const Product<T>& product, const Plan& plan, const Epilogue<T>& epilogue, cudaStream_t stream);
template <class T>
void launch_wgmma(const Product<T>& product, const Plan& plan, const Epilogue<T>& epilogue, void* copy_of_b,
                  cudaStream_t stream);

template <class T>
Plan plan_for(MainLoop main_loop, const Product<T>& p) {
  if (main_loop == MainLoop::simt) return plan_for_simt(p);
  if (main_loop == MainLoop::mma) {
    return plan_for_tensor_cores(main_loop, p.M, p.N, p.K, kMmaTiles, kStepBytes / sizeof(T), 2);
  }
  return plan_for_tensor_cores(main_loop, p.M, p.N, p.K, kWgmmaTiles, kWgmmaStepBytes / sizeof(T), 1);
}

template <class T>
MainLoop main_loop_for(const Product<T>& p) {
  // Of C, for which a copy of B costs less than mma's slower instruction.
  constexpr int64_t kLeastRowsForCopy = 2048;
  const bool tensor_cores = (sizeof(T) == 2 || (sizeof(T) == 4 && p.allow_tf32)) && p.c && p.M > 0 && p.N > 0;
  if constexpr (sizeof(T) <= 4) {
    if (!tensor_cores) return MainLoop::simt;
    const bool pays = !transposes_b(p) || p.M >= kLeastRowsForCopy;
    if (wgmma_can(p) && pays && has_wgmma<T>()) return MainLoop::wgmma;
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
    launch(
        "product simt", product_simt_kernel<T, Tile, kMajorA, kMajorB>,
        Shape{blocks_of(plan), kTileThreads, 1, SimtKernel<T, Tile, kMajorA, kMajorB>::shared_bytes(masked, sums_rows)},
        stream, work);
  };
  if constexpr (sizeof(T) == 2) {
    start.template operator()<SmallTile, Major::k, Major::k>();
  } else {
    with_majors(major_of(product.a), major_of(product.b), [&]<Major kMajorA, Major kMajorB>() {
      if (plan.tile == 0) return start.template operator()<SmallTile, kMajorA, kMajorB>();
      if (plan.tile == 1) return start.template operator()<MediumTile<T>, kMajorA, kMajorB>();
      if constexpr (kSimtTilesOf<T> > 2) start.template operator()<LargeTile, kMajorA, kMajorB>();
    });
  }
}

template <class T>
int64_t product_workspace_bytes(const Product<T>& p, MainLoop main_loop) {
  const int64_t copy_of_b = main_loop == MainLoop::wgmma ? transposed_bytes(p) : 0;
  return copy_of_b + epilogue_workspace_bytes(p, plan_for(main_loop, p).tiling.splits);
}

template <class T>
int64_t product_workspace_bytes(const Product<T>& p) {
  return product_workspace_bytes(p, main_loop_for(p));
}

template <class T>
void start_product(const Product<T>& p, MainLoop main_loop, void* workspace, cudaStream_t stream) {
  if (p.M == 0 || ((!p.c || p.N == 0) && !p.row_sums)) return;
  const Plan plan = plan_for(main_loop, p);
  char* memory = static_cast<char*>(workspace);
  if (main_loop == MainLoop::wgmma) memory += transposed_bytes(p);
  const Epilogue<T> epilogue = epilogue_of(p, plan.tiling.splits, memory);
  if constexpr (sizeof(T) <= 4) {
    if (main_loop == MainLoop::mma) launch_mma(p, plan, epilogue, stream);
    if (main_loop == MainLoop::wgmma) launch_wgmma(p, plan, epilogue, workspace, stream);
  }
  if (main_loop == MainLoop::simt) launch_simt(p, plan, epilogue, stream);
  reduce_splits(epilogue, stream);
}

template <class T>
void start_product(const Product<T>& p, void* workspace, cudaStream_t stream) {
  start_product(p, main_loop_for(p), workspace, stream);
}

}  // namespace mnist_ext::cuda
