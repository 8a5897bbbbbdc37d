// What becomes of a product's sums, whichever main loop has made them: bias, ReLU and rounding into C, the sums of A's
// rows; or, of a part of K (split-K), partial sums in the workspace, to which a second kernel does the same.
#pragma once

#include "../../api/product.h"
#include "../device/elements.cuh"

namespace mnist_ext::cuda {

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The elements of `a`, in a word or a vector, whose element of the ReLU mask is not <= 0, and 0 for the others.
template <class T, class Words>
__device__ Words behind_mask(Words a, const Words& mask) {
  constexpr int kSize = sizeof(Words) / sizeof(T);
  T elements[kSize], masks[kSize];
  memcpy(elements, &a, sizeof a);
  memcpy(masks, &mask, sizeof mask);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (widen(masks[i]) <= 0) elements[i] = T{};
  }
  memcpy(&a, elements, sizeof a);
  return a;
}

template <class T>
struct Epilogue {
  using S = ComputeType<T>;

  int64_t M, N;
  const T* bias;  // or null
  bool relu, accumulate;
  const T* c_mask;  // as c: where it is <= 0, C is 0; or null
  bool aligned;     // whether every row of c, and of its mask, begins at a multiple of 16 bytes
  T* c;
  T* row_sums;  // or null
  // Where K is split:
  int splits;
  int64_t pitch;             // of a row of partial sums, which begins at a multiple of 16 bytes
  S* partial;                // [splits, M, pitch]; null: K is whole
  double* partial_row_sums;  // [splits, M]
};

template <class T>
int64_t partial_pitch(const Product<T>& p) {
  constexpr int64_t kVector = kPack<ComputeType<T>>;
  return p.c ? ceil_div(p.N, kVector) * kVector : 0;
}

template <class T>
int64_t partial_bytes(const Product<T>& p, int splits) {
  return splits == 1 ? 0 : splits * p.M * partial_pitch(p) * static_cast<int64_t>(sizeof(ComputeType<T>));
}

template <class T>
int64_t epilogue_workspace_bytes(const Product<T>& p, int splits) {
  const int64_t row_sums = splits == 1 || !p.row_sums ? 0 : splits * p.M * static_cast<int64_t>(sizeof(double));
  return partial_bytes(p, splits) + row_sums;
}

template <class T>
Epilogue<T> epilogue_of(const Product<T>& p, int splits, void* workspace) {
  char* memory = splits > 1 ? static_cast<char*>(workspace) : nullptr;
  return {.M = p.M,
          .N = p.c ? p.N : 0,
          .bias = p.bias,
          .relu = p.relu,
          .accumulate = p.accumulate,
          .c_mask = p.c_mask,
          .aligned = elements_past_alignment(p.c) == 0 && elements_past_alignment(p.c_mask) == 0 && p.N % kPack<T> == 0,
          .c = p.c,
          .row_sums = p.row_sums,
          .splits = splits,
          .pitch = partial_pitch(p),
          .partial = reinterpret_cast<ComputeType<T>*>(memory),
          .partial_row_sums = reinterpret_cast<double*>(memory + partial_bytes(p, splits))};
}

// 0 too where it is not to be added yet.
template <class T, int N>
__device__ Pack<ComputeType<T>, N> bias_at(const Epilogue<T>& epilogue, int64_t column) {
  Pack<ComputeType<T>, N> bias{};
  if (!epilogue.bias || epilogue.partial) return bias;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (column + i < epilogue.N) bias.at[i] = widen(epilogue.bias[column + i]);
  }
  return bias;
}

// N neighbours in a row of C, if they are inside; column is a multiple of N. All of K has been summed. NaN stays NaN.
template <class T, int N>
__device__ void store_finished(const Epilogue<T>& epilogue, int64_t row, int64_t column,
                               const Pack<ComputeType<T>, N>& sums, const Pack<ComputeType<T>, N>& bias) {
  if (row >= epilogue.M || column >= epilogue.N) return;
  Pack<T, N> finals;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const ComputeType<T> sum = sums.at[i] + bias.at[i];
    finals.at[i] = epilogue.relu && sum <= 0 ? 0 : sum;
  }
  T* place = epilogue.c + row * epilogue.N + column;
  if (epilogue.c_mask) {
    const T* mask = epilogue.c_mask + (place - epilogue.c);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (column + i < epilogue.N && widen(mask[i]) <= 0) finals.at[i] = 0;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (epilogue.accumulate && column + i < epilogue.N) finals.at[i] += widen(place[i]);
  }
  if (column + N <= epilogue.N) return store_pack_global(place, finals, epilogue.aligned);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (column + i < epilogue.N) narrow(finals.at[i], place[i]);
  }
}

template <class T, int N>
__device__ void store_sums(const Epilogue<T>& epilogue, int split, int64_t row, int64_t column,
                           const Pack<ComputeType<T>, N>& sums, const Pack<ComputeType<T>, N>& bias) {
  if (!epilogue.partial) return store_finished(epilogue, row, column, sums, bias);
  if (row >= epilogue.M || column >= epilogue.N) return;
  store_pack_global(epilogue.partial + (split * epilogue.M + row) * epilogue.pitch + column, sums, true);
}

template <class T>
__device__ void store_finished_row_sum(const Epilogue<T>& epilogue, int64_t row, double sum) {
  const auto before = epilogue.accumulate ? widen(epilogue.row_sums[row]) : 0;
  narrow(static_cast<ComputeType<T>>(sum) + before, epilogue.row_sums[row]);
}

template <class T>
__device__ void store_row_sum(const Epilogue<T>& epilogue, int split, int64_t row, double sum) {
  if (row >= epilogue.M) return;
  if (epilogue.partial) {
    epilogue.partial_row_sums[split * epilogue.M + row] = sum;
  } else {
    store_finished_row_sum(epilogue, row, sum);
  }
}

inline constexpr unsigned kReduceThreads = 256;

// Adds the partial sums of the splits in their order; to each thread a vector of C, or one of the row sums.
template <class T>
__global__ void __launch_bounds__(kReduceThreads) reduce_splits_kernel(const Epilogue<T> epilogue) {
  using S = ComputeType<T>;
  constexpr int kVector = kPack<S>;
  const int64_t vectors_of_row = epilogue.pitch / kVector, vectors = epilogue.M * vectors_of_row;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (i < vectors) {
    Pack<S, kVector> sums{};
#pragma unroll 4
    for (int split = 0; split < epilogue.splits; ++split) {
      const Pack<S, kVector> partial = load_pack<S, kVector>(epilogue.partial + (split * vectors + i) * kVector);
#pragma unroll
      for (int e = 0; e < kVector; ++e) sums.at[e] += partial.at[e];
    }
    Epilogue<T> whole = epilogue;
    whole.partial = nullptr;
    const int64_t column = i % vectors_of_row * kVector;
    store_finished(whole, i / vectors_of_row, column, sums, bias_at<T, kVector>(whole, column));
  } else if (epilogue.row_sums && i - vectors < epilogue.M) {
    double sum = 0;
    for (int split = 0; split < epilogue.splits; ++split) {
      sum += epilogue.partial_row_sums[split * epilogue.M + i - vectors];
    }
    store_finished_row_sum(epilogue, i - vectors, sum);
  }
}

template <class T>
void reduce_splits(const Epilogue<T>& epilogue, cudaStream_t stream) {
  if (epilogue.splits == 1) return;
  const int64_t vectors = epilogue.M * (epilogue.pitch / kPack<ComputeType<T>>);
  const int64_t threads = vectors + (epilogue.row_sums ? epilogue.M : 0);
  launch("product reduce_splits", reduce_splits_kernel<T>,
         Shape{static_cast<unsigned>(ceil_div(threads, kReduceThreads)), kReduceThreads}, stream, epilogue);
}

// Of the tensor cores' fragments, as mma and wgmma have them alike: lane 4 r + c of a warp holds parts of rows r and
// r + 8 of 16; of results columns 2 c and 2 c + 1 of eight.

template <class T>
__device__ float sum_of_elements(uint32_t word) {
  T elements[4 / sizeof(T)];
  memcpy(elements, &word, sizeof word);
  float sum = widen(elements[0]);
  if constexpr (sizeof(T) == 2) sum += widen(elements[1]);
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

// Of the warp's 16 rows from `row` on. Called by whole warps.
template <class T>
__device__ void store_row_sums(const Epilogue<T>& epilogue, int split, const RowSums& share, int64_t row) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = share.total(half);
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    if (lane % 4 == 0) store_row_sum(epilogue, split, row + lane / 4 + 8 * half, static_cast<double>(sum));
  }
}

// The warp's 16 rows of 8 * kTiles columns from (row, column) on. Called by whole warps.
template <class T, int kTiles>
__device__ void store_fragments(const Epilogue<T>& epilogue, int split, const float (&sum)[kTiles][4], int64_t row,
                                int64_t column) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int64_t j = column + 8 * tile + 2 * (lane % 4);
    const Pack<float, 2> bias = bias_at<T, 2>(epilogue, j);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Pack<float, 2> pair = {sum[tile][2 * half], sum[tile][2 * half + 1]};
      store_sums(epilogue, split, row + lane / 4 + 8 * half, j, pair, bias);
    }
  }
}

}  // namespace mnist_ext::cuda
