// A product without tensor cores: each block makes a tile of out, each thread of it a small tile in registers.
//
// The depth is walked through in steps of 64 bytes of an operand. Each step's share of both operands lies in shared
// memory, where cp.async has put it kStages - 1 steps before it is used. An operand is never turned round on its way:
// it lies there along the index whose stride is the smaller one (`Major`), so that copies of 16 bytes work for all four
// combinations, and fragments are read from either form by 16-byte loads without bank conflicts.
#pragma once

#include "../device/async_copy.cuh"
#include "../device/elements.cuh"
#include "../../api/product.h"
#include "tiles.cuh"

namespace mnist_ext::cuda {

// A block's tile of out is kRows x kColumns; a thread's, kThreadRows x kThreadColumns of it.
template <int kRows_, int kColumns_, int kThreadRows_, int kThreadColumns_, int kBlocksPerSm_, bool kVectorsOnly_>
struct SimtTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kThreadRows = kThreadRows_, kThreadColumns = kThreadColumns_;
  static constexpr int kThreads = kRows / kThreadRows * (kColumns / kThreadColumns);
  static constexpr int kBlocksPerSm = kBlocksPerSm_;   // at least: the registers are limited to that
  static constexpr bool kVectorsOnly = kVectorsOnly_;  // no registers to spare for copying single elements
};

// 8 x 16 products for 24 numbers read: shared memory is 3/8 as busy as the multipliers. Two such blocks of 128 threads
// with 255 registers each share a multiprocessor, so that one multiplies while the other waits at its barrier.
using LargeTile = SimtTile<128, 128, 8, 16, 2, true>;
template <class S>  // doubles take twice the registers
using MediumTile = SimtTile<64, 64, 8, 4, sizeof(S) == 8 ? 2 : 4, false>;
using SmallTile = SimtTile<32, 64, 4, 4, 4, false>;

inline constexpr int kStages = 3;

template <class T>
struct SimtWork {
  Product<T> product;
  bool vector_a, vector_b, vector_out;  // can be accessed 16 bytes at a time; vector_a: the gate too
  int64_t depth_of_split;
  unsigned row_tiles, column_tiles;  // blocks: splits x column_tiles x row_tiles
  // With more splits than one: what each of them has summed, for reduce_splits_kernel.
  int splits;
  int64_t pitch;             // of a row of partial sums: columns, rounded up to whole vectors
  ComputeType<T>* partial;   // [splits, rows, pitch]
  double* partial_row_sums;  // [splits, rows], or null
};

// How kOuter rows of one operand lie in shared memory during one step. S: its ComputeType.
template <class S, int kOuter, Major kMajor>
struct SharedTile {
  static constexpr bool kOuterMajor = kMajor == Major::outer;
  static constexpr int kVector = 16 / sizeof(S), kDepth = 4 * kVector, kSize = kOuter * kDepth;

  // Outer-major: [depth][outer]. Depth-major: [outer][depth], changed in two ways. The lanes of a warp read the same
  // vector of rows that are kVector apart: those rows lie side by side. And each row is half as long as all banks: the
  // four vectors of a row change places, differently in each pair of rows, so that eight rows meet in no bank.
  static constexpr __device__ int offset(int outer, int depth) {
    if constexpr (kOuterMajor) return depth * kOuter + outer;
    const int place = outer % kVector * (kOuter / kVector) + outer / kVector;
    return place * kDepth + ((depth / kVector) ^ (place / 2 % 4)) * kVector + depth % kVector;
  }

  // The tile is filled by copies of kWidth elements along the major index. Neighbouring copies are neighbours in global
  // and in shared memory. All sizes are powers of two: of copies whose numbers have no bit in common, the first
  // elements' indices can be added, and their offsets if one of the copies is a multiple of eight rows away.
  template <int kWidth>
  static constexpr __device__ int outer_of(int copy) {
    if constexpr (kOuterMajor) return copy % (kOuter / kWidth) * kWidth;
    const int place = copy / (kDepth / kWidth);
    return place % (kOuter / kVector) * kVector + place / (kOuter / kVector);
  }
  template <int kWidth>
  static constexpr __device__ int depth_of(int copy) {
    return kOuterMajor ? copy / (kOuter / kWidth) : copy % (kDepth / kWidth) * kWidth;
  }
  template <int kWidth>
  static constexpr __device__ int offset_of(int copy) {
    return offset(outer_of<kWidth>(copy), depth_of<kWidth>(copy));
  }
};

// What one thread copies of an operand, step by step.
template <class T, class Tile, class Shared>
class Copies {
 public:
  using S = ComputeType<T>;
  static constexpr bool kWidens = sizeof(T) != sizeof(S);

  // vector: copies of 16 bytes are possible. first: of the tile, in [0, size). depth: where the first step begins.
  __device__ Copies(const Operand<T>& operand, bool vector, int64_t first, int64_t size, int64_t depth)
      : outer_stride_(operand.outer_stride),
        depth_stride_(operand.k_stride),
        vector_(vector) {
    int outer = 0;
    with_width([&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      outer = Shared::template outer_of<kWidth>(threadIdx.x);
      depth_ = Shared::template depth_of<kWidth>(threadIdx.x);
      offset_ = Shared::template offset_of<kWidth>(threadIdx.x);
    });
    constexpr int kMost = Shared::kSize / Shared::kDepth;
    outer_left_ = (size - first < kMost ? static_cast<int>(size - first) : kMost) - outer;
    from_ = operand.data + (first + outer) * outer_stride_ + (depth + depth_) * depth_stride_;
  }

  // Starts those of the next step, of which `depth_left` are inside.
  __device__ void start(S* shared, int depth_left) {
    with_width([&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      for_each_copy<kWidth>([&](int outer_beyond, int depth_beyond, int offset_beyond) {
        const T* from = from_ + outer_beyond * outer_stride_ + depth_beyond * depth_stride_;
        S* to = shared + offset_ + offset_beyond;
        const int outer = outer_left_ - outer_beyond, depth = depth_left - depth_ - depth_beyond;
        const bool inside = outer > 0 && depth > 0;
        if constexpr (kWidens) {
          *to = inside ? widen(*from) : S(0);
        } else {
          int valid = Shared::kOuterMajor ? outer : depth;
          valid = !inside ? 0 : valid < kWidth ? valid : kWidth;
          cp_async<kWidth * sizeof(T)>(to, from, valid * static_cast<int>(sizeof(T)));
        }
      });
    });
    from_ += Shared::kDepth * depth_stride_;
  }

  // Sets what this thread has copied to 0 where `gate`, which has been copied in the same way, is not above 0.
  __device__ void close(S* shared, const S* gate) const {
    with_width([&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      for_each_copy<kWidth>([&](int, int, int offset_beyond) {
        S* place = shared + offset_ + offset_beyond;
        Pack<S, kWidth> pack = load_pack<S, kWidth>(place);
        const Pack<S, kWidth> open = load_pack<S, kWidth>(gate + offset_ + offset_beyond);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) pack.at[k] = open.at[k] <= 0 ? S(0) : pack.at[k];
        store_pack(place, pack);
      });
    });
  }

 private:
  template <class Body>
  __device__ void with_width(const Body& body) const {
    if constexpr (!kWidens) {
      if (Tile::kVectorsOnly || vector_) return body(std::integral_constant<int, Shared::kVector>());
    }
    if constexpr (!Tile::kVectorsOnly) body(std::integral_constant<int, 1>());
  }

  // Of this thread, by what is added to the indices and the offset of its first one.
  template <int kWidth, class Body>
  static __device__ void for_each_copy(const Body& body) {
    constexpr int kCopies = Shared::kSize / kWidth / Tile::kThreads;
    static_assert(kCopies * Tile::kThreads * kWidth == Shared::kSize);
    static_assert(Shared::kOuterMajor || Tile::kThreads * kWidth / Shared::kDepth % 8 == 0);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int copy = i * Tile::kThreads;
      body(Shared::template outer_of<kWidth>(copy), Shared::template depth_of<kWidth>(copy),
           Shared::template offset_of<kWidth>(copy));
    }
  }

  const T* from_;
  int64_t outer_stride_, depth_stride_;
  int outer_left_, depth_, offset_;
  bool vector_;
};

// Which rows or columns of the block's tile a thread has: kCount of kOuter, in vectors, those of neighbouring lanes
// side by side.
template <class S, int kOuter, int kCount>
struct Share {
  static constexpr int kVector = 16 / sizeof(S);

  int lane;  // 0 .. kOuter / kCount - 1

  __device__ int operator[](int i) const { return first() + beyond_first(i); }
  __device__ int first() const { return lane * kVector; }
  static constexpr __device__ int beyond_first(int i) {
    return i / kVector * (kOuter / kCount) * kVector + i % kVector;
  }

  // Where the tile has element [(*this)[i], depth + k]; depth is a multiple of kVector. Only the first part depends on
  // the lane, as the rest is a multiple of eight rows (see SharedTile).
  template <class Shared>
  __device__ int offset(int i, int depth, int k) const {
    static_assert(kOuter / kCount % 8 == 0 && kOuter / kVector % 8 == 0);
    return Shared::offset(first(), depth) + Shared::offset(beyond_first(i), k);
  }
};

// A thread's results.
template <class S, class Tile, Major kMajorA, Major kMajorB>
struct ThreadTile {
  static constexpr int kVector = 16 / sizeof(S);
  using A = SharedTile<S, Tile::kRows, kMajorA>;
  using B = SharedTile<S, Tile::kColumns, kMajorB>;

  // A warp has 8 x 4 threads. Lanes that differ in bit 0 read the same of a, those that differ in bit 1 the same of b:
  // so the two quarters of each half of the warp are served at once.
  static constexpr int kRowLanes = 8, kColumnLanes = 4;
  static_assert(Tile::kRows / Tile::kThreadRows % kRowLanes == 0);
  static_assert(Tile::kColumns / Tile::kThreadColumns % kColumnLanes == 0);
  static constexpr int kWarpColumns = Tile::kColumns / Tile::kThreadColumns / kColumnLanes;

  Share<S, Tile::kRows, Tile::kThreadRows> rows;
  Share<S, Tile::kColumns, Tile::kThreadColumns> columns;
  S sums[Tile::kThreadRows][Tile::kThreadColumns] = {};

  __device__ ThreadTile() {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    rows.lane = warp / kWarpColumns * kRowLanes + lane / 2 % kRowLanes;
    columns.lane = warp % kWarpColumns * kColumnLanes + lane % 2 + lane / 16 * 2;
  }

  __device__ void add_step(const S* a, const S* b) {
#pragma unroll 2  // more would take more registers, to load further ahead
    for (int depth = 0; depth < A::kDepth; depth += kVector) {
      S x[kVector][Tile::kThreadRows];
      read_rows(a, depth, x);
      if constexpr (B::kOuterMajor) {
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
#pragma unroll
          for (int j = 0; j < Tile::kThreadColumns; j += kVector) {
            const Pack<S, kVector> y = load_pack<S, kVector>(b + columns.template offset<B>(j, depth, k));
#pragma unroll
            for (int e = 0; e < kVector; ++e) add(j + e, x[k], y.at[e]);
          }
        }
      } else {
#pragma unroll
        for (int j = 0; j < Tile::kThreadColumns; ++j) {
          const Pack<S, kVector> y = load_pack<S, kVector>(b + columns.template offset<B>(j, depth, 0));
#pragma unroll
          for (int k = 0; k < kVector; ++k) add(j, x[k], y.at[k]);
        }
      }
    }
  }

 private:
  __device__ void read_rows(const S* a, int depth, S (&x)[kVector][Tile::kThreadRows]) const {
    if constexpr (A::kOuterMajor) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
#pragma unroll
        for (int i = 0; i < Tile::kThreadRows; i += kVector) {
          const Pack<S, kVector> pack = load_pack<S, kVector>(a + rows.template offset<A>(i, depth, k));
#pragma unroll
          for (int e = 0; e < kVector; ++e) x[k][i + e] = pack.at[e];
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < Tile::kThreadRows; ++i) {
        const Pack<S, kVector> pack = load_pack<S, kVector>(a + rows.template offset<A>(i, depth, 0));
#pragma unroll
        for (int k = 0; k < kVector; ++k) x[k][i] = pack.at[k];
      }
    }
  }

  __device__ void add(int j, const S (&x)[Tile::kThreadRows], S y) {
#pragma unroll
    for (int i = 0; i < Tile::kThreadRows; ++i) sums[i][j] = fma(x[i], y, sums[i][j]);
  }
};

// The epilogue of a vector of a row of out. column: of its first element.
template <class T, int N>
__device__ void finish(const Product<T>& p, int64_t row, int64_t column, Pack<T, N> sums, bool vector_out) {
  using S = ComputeType<T>;
  if (column >= p.N) return;
  const int inside = p.N - column < N ? static_cast<int>(p.N - column) : N;
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if (p.bias && e < inside) sums.at[e] += widen(p.bias[column + e]);
    if (p.relu) sums.at[e] = sums.at[e] <= 0 ? S(0) : sums.at[e];  // NaN stays
  }
  T* out = p.c + row * p.N + column;
  if (inside == N) return store_pack_global(out, sums, vector_out);
#pragma unroll
  for (int e = 0; e < N; ++e) {
    if (e < inside) narrow(sums.at[e], out[e]);
  }
}

template <class T, class Tile, Major kMajorA, Major kMajorB>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm) linear_simt_kernel(const SimtWork<T> work) {
  using S = ComputeType<T>;
  using Results = ThreadTile<S, Tile, kMajorA, kMajorB>;
  using A = typename Results::A;
  using B = typename Results::B;
  const Product<T>& p = work.product;

  const int64_t first_row = static_cast<int64_t>(blockIdx.x % work.row_tiles) * Tile::kRows;
  const unsigned rest = blockIdx.x / work.row_tiles;
  const int64_t first_column = static_cast<int64_t>(rest % work.column_tiles) * Tile::kColumns;
  const int64_t split = rest / work.column_tiles, begin = split * work.depth_of_split;
  const int64_t end = begin + work.depth_of_split < p.K ? begin + work.depth_of_split : p.K;
  const bool sums_row = p.row_sums && first_column == 0 && threadIdx.x < Tile::kRows;

  S* const shared = reinterpret_cast<S*>(shared_memory());
  const int stage_size = A::kSize + B::kSize + (p.relu_mask.data ? A::kSize : 0);
  const auto a_of = [&](int stage) { return shared + stage * stage_size; };
  const auto b_of = [&](int stage) { return a_of(stage) + A::kSize; };
  const auto gate_of = [&](int stage) { return b_of(stage) + B::kSize; };

  Copies<T, Tile, A> a(p.a, work.vector_a, first_row, p.M, begin);
  Copies<T, Tile, A> gate(p.relu_mask, work.vector_a, first_row, p.M, begin);
  Copies<T, Tile, B> b(p.b, work.vector_b, first_column, p.N, begin);
  int64_t not_started = end - begin;
  const auto start_step = [&](int stage) {
    if (not_started > 0) {
      const int depth = not_started < A::kDepth ? static_cast<int>(not_started) : A::kDepth;
      a.start(a_of(stage), depth);
      b.start(b_of(stage), depth);
      if (p.relu_mask.data) gate.start(gate_of(stage), depth);
      not_started -= A::kDepth;
    }
    cp_async_commit();  // an empty group at the end, so that the count of groups is that of the steps
  };

  // In shared memory, as registers are scarce; each thread uses its own alone.
  double* const row_sum = reinterpret_cast<double*>(shared + kStages * stage_size) + threadIdx.x;
  if (sums_row) *row_sum = 0;

  Results results;
  for (int stage = 0; stage < kStages - 1; ++stage) start_step(stage);
  int stage = 0;
  for (int64_t left = end - begin; left > 0; left -= A::kDepth) {
    cp_async_wait<kStages - 2>();
    if (p.relu_mask.data) a.close(a_of(stage), gate_of(stage));
    __syncthreads();  // this step is there for all, and nobody reads the last one any more
    start_step(stage == 0 ? kStages - 1 : stage - 1);
    if (sums_row) {
      S sum = 0;
#pragma unroll 4
      for (int depth = 0; depth < A::kDepth; ++depth) sum += a_of(stage)[A::offset(threadIdx.x, depth)];
      *row_sum += sum;
    }
    results.add_step(a_of(stage), b_of(stage));
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }

  if (sums_row && first_row + threadIdx.x < p.M) {
    const int64_t row = first_row + threadIdx.x;
    if (work.splits > 1) {
      work.partial_row_sums[split * p.M + row] = *row_sum;
    } else {
      narrow(static_cast<S>(*row_sum), p.row_sums[row]);
    }
  }
  constexpr int kVector = Results::kVector;
#pragma unroll
  for (int i = 0; i < Tile::kThreadRows; ++i) {
    const int64_t row = first_row + results.rows[i];
    if (row >= p.M) continue;
#pragma unroll
    for (int j = 0; j < Tile::kThreadColumns; j += kVector) {
      const int64_t column = first_column + results.columns[j];
      if (work.splits > 1) {
        Pack<S, kVector> sums;
        for (int e = 0; e < kVector; ++e) sums.at[e] = results.sums[i][j + e];
        if (column < p.N) store_pack(work.partial + (split * p.M + row) * work.pitch + column, sums);
      } else {
        Pack<T, kVector> sums;
        for (int e = 0; e < kVector; ++e) sums.at[e] = results.sums[i][j + e];
        finish(p, row, column, sums, work.vector_out);
      }
    }
  }
}

inline constexpr unsigned kReduceThreads = 256;

// Adds the splits' partial sums in their order, a vector of out or one of row_sums to each thread.
template <class T>
__global__ void __launch_bounds__(kReduceThreads) reduce_splits_kernel(const SimtWork<T> work) {
  using S = ComputeType<T>;
  constexpr int kVector = 16 / sizeof(S);
  const Product<T>& p = work.product;
  const int64_t vectors_of_row = work.pitch / kVector, vectors = p.M * vectors_of_row;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x;
  if (i < vectors) {
    Pack<T, kVector> sums{};
    for (int split = 0; split < work.splits; ++split) {
      const Pack<S, kVector> partial = load_pack<S, kVector>(work.partial + (split * vectors + i) * kVector);
#pragma unroll
      for (int e = 0; e < kVector; ++e) sums.at[e] += partial.at[e];
    }
    finish(p, i / vectors_of_row, i % vectors_of_row * kVector, sums, work.vector_out);
  } else if (p.row_sums && i - vectors < p.M) {
    double sum = 0;
    for (int split = 0; split < work.splits; ++split) sum += work.partial_row_sums[split * p.M + i - vectors];
    narrow(static_cast<S>(sum), p.row_sums[i - vectors]);
  }
}

}  // namespace mnist_ext::cuda
