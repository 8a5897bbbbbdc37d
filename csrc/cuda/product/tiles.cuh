// How a product is cut up, and how tiles of its operands come into shared memory by cp.async, for the main loops simt
// and mma: several steps of K are under way while one is multiplied.
#pragma once

#include "../device/tensor_cores.cuh"
#include "epilogue.cuh"

namespace mnist_ext::cuda {

// A block makes a tile of C, or of the sums over a part of K (split-K).
struct Tiling {
  int row_tiles, column_tiles, splits;
  int64_t K, k_of_split;
};

struct TileShare {
  int row, column;  // of the tile, in tiles
  int split;
  int64_t first_k, K;
};

// Tiles that run at the same time share rows and columns, which the L2 cache then holds: bands of eight tiles of rows,
// and through each column by column.
__device__ inline TileShare share_of(const Tiling& tiling, int item) {
  constexpr int kBand = 8;
  const int tiles = tiling.row_tiles * tiling.column_tiles, split = item / tiles, i = item % tiles;
  const int64_t first_k = split * tiling.k_of_split, left = tiling.K - first_k;
  TileShare share = {.row = i % tiling.row_tiles,
                     .column = i / tiling.row_tiles,
                     .split = split,
                     .first_k = first_k,
                     .K = left < tiling.k_of_split ? left : tiling.k_of_split};
  if (tiling.row_tiles <= kBand) return share;
  const int band = i / tiling.column_tiles / kBand, in_band = i - band * kBand * tiling.column_tiles;
  const int height = tiling.row_tiles - band * kBand < kBand ? tiling.row_tiles - band * kBand : kBand;
  share.row = band * kBand + in_band % height;
  share.column = in_band / height;
  return share;
}

template <class T>
Major major_of(const Operand<T>& operand) {
  const bool outer = operand.k_stride != 1 &&
                     (operand.outer_stride == 1 || std::abs(operand.outer_stride) < std::abs(operand.k_stride));
  return outer ? Major::outer : Major::k;
}

// Calls with the majors of A and B as template arguments. There are those of a layer's three products; in the fourth
// combination, which none of them has, B is read across its own major index, element by element.
template <class F>
void with_majors(Major a, Major b, const F& f) {
  if (a == Major::outer) return f.template operator()<Major::outer, Major::outer>();
  b == Major::k ? f.template operator()<Major::k, Major::k>() : f.template operator()<Major::k, Major::outer>();
}

inline constexpr int kChunk = 16;         // bytes of one copy
inline constexpr int kStepBytes = 64;     // of K, in each step
inline constexpr int kTileThreads = 128;  // of a block

// An operand in global memory.
template <class T>
struct Source {
  Operand<T> operand;
  bool in_chunks;  // whether alignment and strides allow copies of 16 bytes
};

// For tiles with this major index, whichever the operand's own is.
template <class T>
Source<T> source_of(const Operand<T>& operand, Major major) {
  const int64_t unit = major == Major::k ? operand.k_stride : operand.outer_stride;
  const int64_t other = major == Major::k ? operand.outer_stride : operand.k_stride;
  return {operand, unit == 1 && elements_past_alignment(operand.data) == 0 && other % kPack<T> == 0};
}

// The arguments of a kernel.
template <class T>
struct TiledWork {
  Source<T> a, relu_mask, b;
  Tiling tiling;
  Epilogue<T> epilogue;
};

// Brings the tiles of an operand into shared memory, one after the other along K. A Tile has kRows rows of
// kChunksOfRow chunks along its kMajor index; Tile::row_of(slot) is the row that lies at a slot, Tile::place(slot,
// chunk) where.
template <class T, class Tile>
class TileLoader {
  static constexpr bool kByK = Tile::kMajor == Major::k;
  static constexpr int kChunkSize = kPack<T>;
  static constexpr int kRowsAtOnce = kTileThreads / Tile::kChunksOfRow;
  static constexpr int kPasses = Tile::kRows / kRowsAtOnce;
  static_assert(kTileThreads % Tile::kChunksOfRow == 0 && Tile::kRows % kRowsAtOnce == 0);

 public:
  // size: of the outer index. `source` outlives this; it is in the kernel's arguments, where its strides cost no
  // registers.
  __device__ TileLoader(const Source<T>& source, int64_t size, int64_t first_outer, int64_t first_k) : source_(source) {
    const int64_t outer = first_outer + (kByK ? row() : element()), k = first_k + (kByK ? element() : row());
    from_ = source.operand.data + outer * source.operand.outer_stride + k * source.operand.k_stride;
    const int64_t left = size - outer;
    outer_left_ = static_cast<int>(left < Tile::kOuter ? left : Tile::kOuter);
  }

  // Starts the copies of the next tile, of which k are inside; the rest is filled with 0.
  __device__ void load(char* tile, int k) {
    const int64_t stride = kByK ? source_.operand.outer_stride : source_.operand.k_stride;
    if (source_.in_chunks) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        cp_async<kChunk>(place(tile, pass), from_ + rows_beyond(pass) * stride,
                         size(pass, k) * static_cast<int>(sizeof(T)));
      }
    } else {
#pragma unroll 1
      for (int pass = 0; pass < kPasses; ++pass) {
        load_elements(place(tile, pass), from_ + rows_beyond(pass) * stride, size(pass, k));
      }
    }
    from_ += Tile::kK * source_.operand.k_stride;
  }

  // Sets what this thread has copied to 0 where the mask, which it has copied in the same way, is <= 0.
  __device__ void apply_mask(char* tile, char* mask) const {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      char* to = place(tile, pass);
      store_vector(to, behind_mask<T>(load_vector<uint4>(to), load_vector<uint4>(place(mask, pass))));
    }
  }

 private:
  __device__ static int slot() { return static_cast<int>(threadIdx.x) / Tile::kChunksOfRow; }
  __device__ static int chunk() { return static_cast<int>(threadIdx.x) % Tile::kChunksOfRow; }
  __device__ static int row() { return Tile::row_of(slot()); }
  __device__ static int element() { return chunk() * kChunkSize; }
  // Sizes are powers of two: numbers of slots that have no bit in common can be added, and their rows too.
  static constexpr __device__ int rows_beyond(int pass) { return Tile::row_of(pass * kRowsAtOnce); }
  __device__ static char* place(char* tile, int pass) {
    return tile + Tile::place(slot() + pass * kRowsAtOnce, chunk());
  }

  // Of this thread's chunk.
  __device__ int size(int pass, int k_left) const {
    const int beyond = rows_beyond(pass);
    const int left =
        kByK ? (beyond < outer_left_ ? k_left - element() : 0) : (row() + beyond < k_left ? outer_left_ : 0);
    return left < 0 ? 0 : left < kChunkSize ? left : kChunkSize;
  }

  __device__ void load_elements(char* to, const T* from, int size) const {
    const int64_t next = kByK ? source_.operand.k_stride : source_.operand.outer_stride;
    if constexpr (sizeof(T) >= 4) {
#pragma unroll
      for (int i = 0; i < kChunkSize; ++i) {
        cp_async<sizeof(T)>(to + i * sizeof(T), from + i * next, i < size ? sizeof(T) : 0);
      }
    } else {
      T elements[kChunkSize] = {};
#pragma unroll
      for (int i = 0; i < kChunkSize; ++i) {
        if (i < size) elements[i] = from[i * next];
      }
      uint4 bits;
      memcpy(&bits, elements, sizeof bits);
      store_vector(to, bits);
    }
  }

  const Source<T>& source_;
  const T* from_;  // this thread's first chunk of the next tile
  int outer_left_;
};

// The steps of K that a block multiplies: a ring of stages, each with a tile of A, one of B and, where there is one, of
// A's ReLU mask.
template <class T, class TileA, class TileB>
class OperandRing {
  static constexpr int kStages = 3;

 public:
  __host__ __device__ static constexpr int shared_bytes(bool masked) {
    return kStages * (TileA::kBytes + TileB::kBytes + (masked ? TileA::kBytes : 0));
  }

  // Calls multiply(tile of A behind its mask, tile of B) for each step of the share, when these are there for all
  // threads.
  template <class Multiply>
  __device__ static void for_each_step(const TiledWork<T>& work, const TileShare& share, char* shared,
                                       const Multiply& multiply) {
    const bool masked = work.relu_mask.operand.data != nullptr;
    const int stage_bytes = TileA::kBytes + TileB::kBytes + (masked ? TileA::kBytes : 0);
    const int64_t row = int64_t{share.row} * TileA::kOuter, column = int64_t{share.column} * TileB::kOuter;
    const int64_t M = work.epilogue.M, N = work.epilogue.N;
    TileLoader<T, TileA> a(work.a, M, row, share.first_k), mask(work.relu_mask, M, row, share.first_k);
    TileLoader<T, TileB> b(work.b, N, column, share.first_k);
    const int steps = static_cast<int>(ceil_div(share.K, TileA::kK));
    const int last_k = static_cast<int>(share.K - int64_t{steps - 1} * TileA::kK);  // of the last step
    const auto start = [&](int step, char* to) {
      if (step < steps) {
        const int k = step == steps - 1 ? last_k : TileA::kK;
        a.load(to, k);
        b.load(to + TileA::kBytes, k);
        if (masked) mask.load(to + TileA::kBytes + TileB::kBytes, k);
      }
      cp_async_commit();  // an empty group at the end, so that the number of groups is that of steps
    };
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) start(i, shared + i * stage_bytes);
    int at = 0, last = (kStages - 1) * stage_bytes;  // in the ring, in bytes
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<kStages - 2>();
      char* tiles = shared + at;
      if (masked) a.apply_mask(tiles, tiles + TileA::kBytes + TileB::kBytes);
      __syncthreads();  // the step is there for all, and all are through with the one before it, whose place is free
      start(step + kStages - 1, shared + last);
      multiply(tiles, tiles + TileA::kBytes);
      last = at;
      at = at == (kStages - 1) * stage_bytes ? 0 : at + stage_bytes;
    }
    cp_async_wait<0>();  // of empty groups
  }
};

}  // namespace mnist_ext::cuda
