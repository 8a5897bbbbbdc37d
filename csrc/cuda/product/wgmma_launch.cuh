// Which products wgmma_product takes, and which tiles it cuts them into.
#pragma once

#include "wgmma.cuh"
#include "transpose.cuh"

namespace mnist_ext::cuda {

// As the Tensor Memory Accelerator copies it: rows that begin at multiples of 16 bytes and do not overlap.
template <class T>
bool is_copied_in_boxes(const Operand<T>& operand, int64_t outer, int64_t depth) {
  constexpr int64_t kMost = 0x7fffffff, kMostBytes = int64_t{1} << 40;
  const bool by_depth = major_of(operand) == Major::depth;
  const int64_t unit = by_depth ? operand.k_stride : operand.outer_stride, row_size = by_depth ? depth : outer;
  const int64_t stride = (by_depth ? operand.outer_stride : operand.k_stride) * static_cast<int64_t>(sizeof(T));
  return unit == 1 && elements_past_alignment(operand.data) == 0 && stride % 16 == 0 && stride < kMostBytes &&
         stride >= row_size * static_cast<int64_t>(sizeof(T)) && outer <= kMost - 256 && depth <= kMost - 256;
}

// Below that mma_product's smaller tiles waste less.
inline constexpr int64_t kWgmmaLeast = 128;

template <class T>
bool uses_fragments(const Product<T>& product) {
  return product.relu_mask.data || product.row_sums || major_of(product.a) == Major::outer;
}

// Whether the device has these instructions, and this library code for them: plain sm_90's has none.
template <class T>
bool has_wgmma() {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) != 9) return false;
#ifdef __CUDACC__
  static const bool has_code = [] {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, linear_wgmma_kernel<T, Major::depth, Major::depth, false, 128>),
          "cudaFuncGetAttributes");
    return attributes.maxThreadsPerBlock >= kWgmmaThreads;
  }();
  return has_code;
#else
  return true;
#endif
}

// Whether b is copied first, so that it lies along the depth: the tensor cores read floats no other way.
template <class T>
bool transposes_b(const Product<T>& product) {
  return sizeof(T) == 4 && major_of(product.b) == Major::outer;
}

// b as the tensor cores read it, whose rows begin at multiples of 16 bytes.
template <class T>
Operand<T> transposed_b(const Product<T>& product, const void* copy) {
  return {static_cast<const T*>(copy), tiles_of(product.K, kPack<T>) * kPack<T>, 1};
}

template <class T>
int64_t transposed_bytes(const Product<T>& product) {
  if (!transposes_b(product)) return 0;
  return product.N * transposed_b(product, nullptr).outer_stride * static_cast<int64_t>(sizeof(T));
}

// Whether there are kernels for these sizes and layouts.
template <class T>
bool wgmma_can(const Product<T>& p) {
  if (!p.c || p.M < kWgmmaLeast || p.N < kWgmmaLeast || p.K < kWgmmaLeast) return false;
  if (tiles_of(p.M, kWgmmaRows) >= kMostTiles / tiles_of(p.N, 128)) return false;
  if (!is_copied_in_boxes(p.a, p.M, p.K)) return false;
  if (p.relu_mask.data && (!is_copied_in_boxes(p.relu_mask, p.M, p.K) || major_of(p.relu_mask) != major_of(p.a))) return false;
  if (transposes_b(p)) return is_copied_in_boxes(transposed_b(p, nullptr), p.N, p.K);
  if (!is_copied_in_boxes(p.b, p.N, p.K)) return false;
  // Of the half dtypes' layouts with fragments only those of a layer's gradients are compiled.
  return sizeof(T) == 4 || !uses_fragments(p) || major_of(p.b) == Major::outer;
}

// Of the result, for which a copy of b costs less than mma_product's slower instruction.
inline constexpr int64_t kLeastRowsForCopy = 2048;

template <class T>
bool wgmma_takes(const Product<T>& product) {
  return (sizeof(T) == 2 || product.allow_tf32) && wgmma_can(product) &&
         (!transposes_b(product) || product.M >= kLeastRowsForCopy) && has_wgmma<T>();
}

struct WgmmaPlan {
  int columns;       // of a tile
  unsigned cluster;  // blocks
  int row_tiles, column_tiles;
  int depth_tiles, depth_tiles_of_part, parts;
};

// Wide tiles where they fill the device; else narrow ones, and where these do not fill it either, the depth in parts.
template <class T>
WgmmaPlan wgmma_plan(const Product<T>& product) {
  constexpr int kLeastTiles = 8;   // of the depth, in a part of it
  constexpr int kFewRowTiles = 8;  // of which a cluster would waste too much if they are odd
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const auto tiles = [](int64_t size, int side) { return static_cast<int>(tiles_of(size, side)); };
  WgmmaPlan plan{};
  plan.row_tiles = tiles(product.M, kWgmmaRows);
  plan.columns = tiles_of(product.M, kWgmmaRows) * tiles_of(product.N, 256) >= processors ? 256 : 128;
  plan.column_tiles = tiles(product.N, plan.columns);
  plan.cluster = plan.row_tiles % 2 == 0 || plan.row_tiles > kFewRowTiles ? 2 : 1;
  plan.row_tiles += plan.row_tiles % static_cast<int>(plan.cluster);
  plan.depth_tiles = tiles(product.K, kWgmmaDepth<T>);
  int parts = processors / (plan.row_tiles * plan.column_tiles);
  if (parts > plan.depth_tiles / kLeastTiles) parts = plan.depth_tiles / kLeastTiles;
  if (parts < 1) parts = 1;
  plan.depth_tiles_of_part = tiles(plan.depth_tiles, parts);
  plan.parts = tiles(plan.depth_tiles, plan.depth_tiles_of_part);
  return plan;
}

template <class T>
int64_t wgmma_workspace_bytes(const Product<T>& product) {
  return transposed_bytes(product) + parts_bytes(product, wgmma_plan(product).parts);
}

// In boxes of `box` by 128 bytes of the depth, or of 128 bytes by the depth of a stage.
template <class T>
TensorMap boxes_of(const Operand<T>& operand, int64_t outer, int64_t depth, int box, bool in_tf32) {
  const bool by_depth = major_of(operand) == Major::depth;
  const int64_t stride = (by_depth ? operand.outer_stride : operand.k_stride) * static_cast<int64_t>(sizeof(T));
  return by_depth ? tensor_map(operand.data, depth, outer, stride, box, in_tf32)
                  : tensor_map(operand.data, outer, depth, stride, kWgmmaDepth<T>, in_tf32);
}

template <class T, Major kMajorA, Major kMajorB, bool kFragments>
void launch_wgmma(const WgmmaWork<T>& work, const WgmmaPlan& plan, cudaStream_t stream) {
  const int cluster = static_cast<int>(plan.cluster);
  const int items = plan.row_tiles / cluster * plan.column_tiles * plan.parts;
  const int at_once = device_attribute(cudaDevAttrMultiProcessorCount) / cluster;
  const int clusters = at_once < 1 ? 1 : items < at_once ? items : at_once;
  const auto start = [&]<int kColumns>() {
    const Shape shape = {static_cast<unsigned>(clusters) * plan.cluster, kWgmmaThreads, plan.cluster,
                         WgmmaKernel<T, kMajorA, kMajorB, kFragments, kColumns>::kSharedBytes};
    launch("linear wgmma", linear_wgmma_kernel<T, kMajorA, kMajorB, kFragments, kColumns>, shape, stream, work);
  };
  plan.columns == 256 ? start.template operator()<256>() : start.template operator()<128>();
}

template <class T>
void wgmma_product(const Product<T>& product, void* workspace, cudaStream_t stream) {
  const WgmmaPlan plan = wgmma_plan(product);
  const bool fragments = uses_fragments(product);
  const auto boxes_of_rows = [&](const Operand<T>& operand) {
    return boxes_of(operand, product.M, product.K, kWgmmaRows, !fragments);
  };
  Operand<T> b = product.b;
  if (transposes_b(product)) {
    const Operand<T> across = product.b;
    b = transposed_b(product, workspace);
    transpose(across.data, product.K, product.N, across.k_stride, static_cast<T*>(workspace),
              b.outer_stride, stream);
  }
  char* parts = static_cast<char*>(workspace) + transposed_bytes(product);
  const TensorMap a = boxes_of_rows(product.a);
  const WgmmaWork<T> work = {
      .a = a,
      .gate = product.relu_mask.data ? boxes_of_rows(product.relu_mask) : a,
      .b = boxes_of(b, product.N, product.K, plan.columns / static_cast<int>(plan.cluster), true),
      .gated = product.relu_mask.data != nullptr,
      .row_tiles = plan.row_tiles,
      .column_tiles = plan.column_tiles,
      .depth_tiles = plan.depth_tiles,
      .depth_tiles_of_part = plan.depth_tiles_of_part,
      .parts = plan.parts,
      .output = output_of(product, plan.parts, parts)};
  constexpr Major kMajorB = sizeof(T) == 4 ? Major::depth : Major::outer;  // of the gradients
  if (fragments) {
    major_of(product.a) == Major::depth ? launch_wgmma<T, Major::depth, kMajorB, true>(work, plan, stream)
                                        : launch_wgmma<T, Major::outer, kMajorB, true>(work, plan, stream);
  } else {
    major_of(b) == Major::depth ? launch_wgmma<T, Major::depth, Major::depth, false>(work, plan, stream)
                                : launch_wgmma<T, Major::depth, kMajorB, false>(work, plan, stream);
  }
  finish(work.output, plan.parts, stream);
}

}  // namespace mnist_ext::cuda
