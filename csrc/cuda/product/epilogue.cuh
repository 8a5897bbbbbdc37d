// Fragments of the tensor cores' operands and results, as mma.sync and wgmma have them alike: lane 4 r + c of a warp
// holds parts of rows r and r + 8 of 16.
#pragma once

#include "../device/elements.cuh"
#include "../../api/product.h"

namespace mnist_ext::cuda {

// The elements of a word of a fragment: two of a half dtype, or one float.
template <class T>
__device__ Pack<T, 4 / sizeof(T)> elements_of(uint32_t word) {
  Pack<T, 4 / sizeof(T)> pack;
  T elements[4 / sizeof(T)];
  memcpy(elements, &word, sizeof word);
  for (int i = 0; i < pack.size; ++i) pack.at[i] = widen(elements[i]);
  return pack;
}

// The elements of a whose gate is not <= 0, and 0 for the others.
template <class T>
__device__ uint32_t behind_gate(uint32_t a, uint32_t gate) {
  const auto gates = elements_of<T>(gate);
  uint32_t closed = 0;
  for (int i = 0; i < gates.size; ++i) {
    if (gates.at[i] <= 0) closed |= (sizeof(T) == 2 ? 0xffffu : ~0u) << (16 * i);
  }
  return a & ~closed;
}

template <class T>
__device__ float sum_of_elements(uint32_t word) {
  const auto pack = elements_of<T>(word);
  float sum = pack.at[0];
  for (int i = 1; i < pack.size; ++i) sum += pack.at[i];
  return sum;
}

// Sums of rows r and r + 8, of a lane's share of them. What is rounded away is summed too (Knuth's two-sum), so that
// the error does not grow with the length of the rows.
struct RowSums {
  float sum[2] = {}, lost[2] = {};

  // Of a few elements each.
  __device__ void add(const float (&part)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float next = sum[half] + part[half], added = next - sum[half];
      lost[half] += (sum[half] - (next - added)) + (part[half] - added);
      sum[half] = next;
    }
  }

  __device__ float total(int half) const {
    return lost[half] == lost[half] ? sum[half] + lost[half] : sum[half];  // infinity makes NaN of what is lost
  }
};

// What becomes of the sums: rounded into out, or, for a part of the depth, kept in float32 for `linear_finish_kernel`.
template <class T>
struct Output {
  int64_t rows, columns;
  const T* bias;  // or null
  bool relu;
  bool aligned;  // whether every row of out begins at a multiple of 16 bytes
  T* out;
  T* row_sums;              // or null
  float* partial;           // [parts, rows, columns], or null
  float* partial_row_sums;  // [parts, rows]
};

template <class T>
int64_t parts_bytes(const Product<T>& product, int64_t parts) {
  if (parts == 1) return 0;
  return parts * product.M * (product.N + (product.row_sums ? 1 : 0)) * static_cast<int64_t>(sizeof(float));
}

template <class T>
Output<T> output_of(const Product<T>& product, int parts, void* workspace) {
  float* partial = parts > 1 ? static_cast<float*>(workspace) : nullptr;
  return {.rows = product.M,
          .columns = product.N,
          .bias = product.bias,
          .relu = product.relu,
          .aligned = elements_past_alignment(product.c) == 0 && product.N % kPack<T> == 0,
          .out = product.c,
          .row_sums = product.row_sums,
          .partial = partial,
          .partial_row_sums = partial + (partial ? parts * product.M * product.N : 0)};
}

// A sum as it is stored, before the rounding. NaN stays NaN.
template <class T>
__device__ float finished(const Output<T>& output, float sum, float bias) {
  sum += bias;
  return output.relu && sum <= 0 ? 0.0f : sum;
}

template <class T>
__device__ float bias_at(const Output<T>& output, int64_t column) {
  return output.bias && column < output.columns ? widen(output.bias[column]) : 0.0f;
}

// Words of lanes 4 r to 4 r + 3 as a matrix, transposed: lane 4 r + c gets word c of each, in the order of the lanes.
__device__ inline void transpose_among_four(uint32_t (&word)[4], int lane) {
  const auto exchange = [&](int i, int j, int distance) {
    const bool upper = lane & distance;
    const uint32_t received = __shfl_xor_sync(kAllLanes, upper ? word[i] : word[j], distance);
    word[i] = upper ? received : word[i];
    word[j] = upper ? word[j] : received;
  };
  exchange(0, 1, 1);
  exchange(2, 3, 1);
  exchange(0, 2, 2);
  exchange(1, 3, 2);
}

// The warp's 16 rows of 8 * kTiles columns from (row, column) on: 8 bytes from every lane, 32 side by side.
template <bool kFinished, class T, int kTiles>
__device__ void store_floats(float* to, const Output<T>& output, const float (&sum)[kTiles][4], int64_t row,
                             int64_t column) {
  const int lane = threadIdx.x % kWarp;
  const bool in_pairs = output.columns % 2 == 0 && (!kFinished || output.aligned);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int64_t j = column + 8 * tile + 2 * (lane % 4);
    const float bias[2] = {kFinished ? bias_at(output, j) : 0, kFinished ? bias_at(output, j + 1) : 0};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t i = row + lane / 4 + 8 * half;
      float2 pair = {sum[tile][2 * half], sum[tile][2 * half + 1]};
      if constexpr (kFinished) pair = {finished(output, pair.x, bias[0]), finished(output, pair.y, bias[1])};
      float* place = to + i * output.columns + j;
      if (i >= output.rows || j >= output.columns) continue;
      if (in_pairs) {
        store_vector(place, pair);
      } else {
        place[0] = pair.x;
        if (j + 1 < output.columns) place[1] = pair.y;
      }
    }
  }
}

// As store_floats, of a half dtype: 16 bytes from every lane, 64 side by side. Called by whole warps.
template <class Half, int kTiles>
__device__ void store_halves(const Output<Half>& output, const float (&sum)[kTiles][4], int64_t row, int64_t column) {
  static_assert(kTiles % 4 == 0);
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int four = 0; four < kTiles; four += 4) {
    float bias[4][2];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t j = column + 8 * (four + k) + 2 * (lane % 4);
      bias[k][0] = bias_at(output, j);
      bias[k][1] = bias_at(output, j + 1);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t word[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float (&pair)[4] = sum[four + k];
        word[k] = word_of<Half>(finished(output, pair[2 * half], bias[k][0]),
                                finished(output, pair[2 * half + 1], bias[k][1]));
      }
      transpose_among_four(word, lane);
      const int64_t i = row + lane / 4 + 8 * half, j = column + 8 * (four + lane % 4);
      if (i >= output.rows || j >= output.columns) continue;
      Half* place = output.out + i * output.columns + j;
      if (output.aligned) {
        store_words_global(place, uint4{word[0], word[1], word[2], word[3]});
      } else {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          if (j + k < output.columns) place[k].bits = static_cast<uint16_t>(word[k / 2] >> (16 * (k % 2)));
        }
      }
    }
  }
}

template <class T, int kTiles>
__device__ void store_sums(const Output<T>& output, const float (&sum)[kTiles][4], int64_t row, int64_t column,
                           int part) {
  if (output.partial) {
    store_floats<false>(output.partial + part * output.rows * output.columns, output, sum, row, column);
  } else if constexpr (sizeof(T) == 4) {
    store_floats<true>(output.out, output, sum, row, column);
  } else {
    store_halves(output, sum, row, column);
  }
}

// Sums of the warp's 16 rows from `row` on, of which each lane has its share of rows r and r + 8. Called by whole
// warps.
template <class T>
__device__ void store_row_sums(const Output<T>& output, const RowSums& share, int64_t row, int part) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = share.total(half);
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    const int64_t i = row + lane / 4 + 8 * half;
    if (lane % 4 != 0 || i >= output.rows) continue;
    if (output.partial) {
      output.partial_row_sums[part * output.rows + i] = sum;
    } else {
      narrow(sum, output.row_sums[i]);
    }
  }
}

inline constexpr unsigned kFinishThreads = 256;

// Adds up the parts, always in the same order. Grid: any.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) linear_finish_kernel(const Output<T> output, const int parts) {
  const int64_t size = output.rows * output.columns, threads = static_cast<int64_t>(gridDim.x) * kFinishThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
  for (int64_t i = first; i < size; i += threads) {
    float sum = output.partial[i];
#pragma unroll 4
    for (int part = 1; part < parts; ++part) sum += output.partial[part * size + i];
    narrow(finished(output, sum, bias_at(output, i % output.columns)), output.out[i]);
  }
  if (!output.row_sums) return;
  for (int64_t i = first; i < output.rows; i += threads) {
    double sum = output.partial_row_sums[i];
    for (int part = 1; part < parts; ++part) sum += output.partial_row_sums[part * output.rows + i];
    narrow(static_cast<float>(sum), output.row_sums[i]);
  }
}

template <class T>
void finish(const Output<T>& output, int parts, cudaStream_t stream) {
  if (parts == 1) return;
  const int64_t blocks = (output.rows * output.columns + kFinishThreads - 1) / kFinishThreads;
  constexpr int64_t kMaxBlocks = 4096;
  const Shape shape = {static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kFinishThreads};
  launch("linear finish", linear_finish_kernel<T>, shape, stream, output, parts);
}

}  // namespace mnist_ext::cuda
