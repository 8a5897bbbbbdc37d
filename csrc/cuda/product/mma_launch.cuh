// Which tiles mma_product cuts a product into, and how the copies read the operands.
#pragma once

#include "mma.cuh"

namespace mnist_ext::cuda {

template <class T>
bool mma_takes(const Product<T>& product) {
  return (sizeof(T) == 2 || (sizeof(T) == 4 && product.allow_tf32)) && product.c && product.M > 0 &&
         product.N > 0 && tiles_of(product.M, 64) <= kMostTiles / tiles_of(product.N, 64) &&
         device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8;
}

struct MmaPlan {
  int side;  // of a tile
  int row_tiles, column_tiles;
  int parts;  // of the depth
  int64_t depth_of_part;
};

// Large tiles where they fill the device; else small ones, and where these do not fill it either, the depth in parts.
template <class T>
MmaPlan mma_plan(const Product<T>& product) {
  constexpr int64_t kTileDepth = kMmaDepthBytes / sizeof(T), kLeastTiles = 8, kMostParts = 32;
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
  MmaPlan plan{};
  plan.side = tiles_of(product.M, 128) * tiles_of(product.N, 128) >= processors ? 128 : 64;
  plan.row_tiles = static_cast<int>(tiles_of(product.M, plan.side));
  plan.column_tiles = static_cast<int>(tiles_of(product.N, plan.side));
  const int64_t depth_tiles = tiles_of(product.K, kTileDepth);
  int64_t parts = plan.side == 128 ? 1 : 2 * processors / (plan.row_tiles * plan.column_tiles);
  if (parts > depth_tiles / kLeastTiles) parts = depth_tiles / kLeastTiles;
  if (parts > kMostParts) parts = kMostParts;
  if (parts < 1) parts = 1;
  const int64_t tiles_of_part = tiles_of(depth_tiles, parts);
  plan.depth_of_part = (tiles_of_part < 1 ? 1 : tiles_of_part) * kTileDepth;
  plan.parts = static_cast<int>(tiles_of_part < 1 ? 1 : tiles_of(depth_tiles, tiles_of_part));
  return plan;
}

template <class T>
int64_t mma_workspace_bytes(const Product<T>& product) {
  return parts_bytes(product, mma_plan(product).parts);
}

// The copies of tiles with this major index, whichever the operand's own is.
template <class T>
Source<T> source_of(const Operand<T>& operand, int64_t outer, Major major) {
  const bool by_depth = major == Major::depth;
  const int64_t unit = by_depth ? operand.k_stride : operand.outer_stride;
  const int64_t other = by_depth ? operand.outer_stride : operand.k_stride;
  const auto aligned = [&](int bytes) {
    return reinterpret_cast<uintptr_t>(operand.data) % bytes == 0 &&
           other * static_cast<int64_t>(sizeof(T)) % bytes == 0;
  };
  int copy_bytes = 0;
  if (unit == 1 && aligned(16)) {
    copy_bytes = 16;
  } else if (aligned(4) && (unit == 1 || sizeof(T) == 4)) {
    copy_bytes = 4;
  }
  return {operand, outer, copy_bytes};
}

template <class T, Major kMajorA, Major kMajorB>
void launch_mma(const MmaWork<T>& work, const MmaPlan& plan, cudaStream_t stream) {
  const auto start = [&]<bool kGated, int kSide>() {
    const Shape shape = {static_cast<unsigned>(plan.row_tiles * plan.column_tiles * plan.parts), kMmaThreads, 1,
                         MmaKernel<T, kMajorA, kMajorB, kGated, kSide>::kSharedBytes};
    launch("linear mma", linear_mma_kernel<T, kMajorA, kMajorB, kGated, kSide>, shape, stream, work);
  };
  if (plan.side == 128) {
    work.gate.operand.data ? start.template operator()<true, 128>() : start.template operator()<false, 128>();
  } else {
    work.gate.operand.data ? start.template operator()<true, 64>() : start.template operator()<false, 64>();
  }
}

template <class T>
void mma_product(const Product<T>& product, void* workspace, cudaStream_t stream) {
  const MmaPlan plan = mma_plan(product);
  const Major major_a = major_of(product.a), major_b = major_of(product.b);
  const MmaWork<T> work = {.a = source_of(product.a, product.M, major_a),
                           .gate = source_of(product.relu_mask, product.M, major_a),
                           .b = source_of(product.b, product.N, major_b),
                           .depth = product.K,
                           .depth_of_part = plan.depth_of_part,
                           .row_tiles = plan.row_tiles,
                           .column_tiles = plan.column_tiles,
                           .output = output_of(product, plan.parts, workspace)};
  if (major_a == Major::depth) {
    major_b == Major::depth ? launch_mma<T, Major::depth, Major::depth>(work, plan, stream)
                            : launch_mma<T, Major::depth, Major::outer>(work, plan, stream);
  } else {
    major_b == Major::depth ? launch_mma<T, Major::outer, Major::depth>(work, plan, stream)
                            : launch_mma<T, Major::outer, Major::outer>(work, plan, stream);
  }
  finish(work.output, plan.parts, stream);
}

}  // namespace mnist_ext::cuda
