// C = A * B^T (+ bias, ReLU) on the matrix unit: operands split into planes (planes.h), C in blocks of 32 by 32, four
// tiles, over 256 steps of K. Numbers that planes do not hold go by fused multiply-add.
//
// A block takes 6 KB of A and 8 KB of B for each 24 multiplications of 16 cycles: B's 32 columns by 256 steps are
// packed just before all rows pass by, A's rows stay in the second-level cache.
#pragma once

#include "gemm.h"
#include "planes.h"

namespace mnist_ext::MNIST_EXT_ISA {

inline constexpr int64_t kAmxSide = 2 * kAmxRows;  // of a block of C
inline constexpr int64_t kAmxPackedRows = 512;     // of A, packed together: 768 KB

// Where the matrix unit is faster: where splitting M + N numbers for each K is less than it saves of M * N
// multiply-adds, and K is worth a pass over C.
template <class T>
bool use_amx(int64_t M, int64_t N, int64_t K) {
  return kHasAmx && std::is_same_v<T, float> && K >= 4 * kAmxK && M * N >= 64 * (M + N);
}

#if defined(MNIST_EXT_AMX)

// Which planes are multiplied, in an order that loads few tiles twice.
struct PlanePairs {
  int count;
  struct {
    int a, b;
  } pairs[6];
};
inline constexpr PlanePairs kExactPairs = {6, {{1, 1}, {1, 0}, {2, 0}, {0, 0}, {0, 1}, {0, 2}}};
inline constexpr PlanePairs kRoundedPairs = {3, {{1, 0}, {0, 0}, {0, 1}, {}, {}, {}}};  // 16 bits of each factor

// The sums over K of a block of C. a, b: its first 16 rows and columns; `next` bytes behind them the others, if any.
template <const PlanePairs& planes, bool more_rows, bool more_columns>
void sum_block(AmxTiles& tiles, const char* a, const char* b, int64_t next, float (&sums)[kAmxSide][kAmxSide]) {
  tiles.zero<0>();
  if (more_columns) tiles.zero<1>();
  if (more_rows) tiles.zero<2>();
  if (more_rows && more_columns) tiles.zero<3>();
  for (const char* end = a + next; a < end; a += kPlanes * kAmxBytes, b += kPlanes * kAmxBytes) {
#pragma GCC unroll 6
    for (int i = 0; i < planes.count; ++i) {
      const int of_a = planes.pairs[i].a, of_b = planes.pairs[i].b;
      if (i == 0 || of_a != planes.pairs[i - 1].a) {
        tiles.load<4>(a + of_a * kAmxBytes);
        if (more_rows) tiles.load<5>(a + next + of_a * kAmxBytes);
      }
      if (i == 0 || of_b != planes.pairs[i - 1].b) {
        tiles.load<6>(b + of_b * kAmxBytes);
        if (more_columns) tiles.load<7>(b + next + of_b * kAmxBytes);
      }
      tiles.multiply<0, 4, 6>();
      if (more_columns) tiles.multiply<1, 4, 7>();
      if (more_rows) tiles.multiply<2, 5, 6>();
      if (more_rows && more_columns) tiles.multiply<3, 5, 7>();
    }
  }
  tiles.store<0>(sums[0], kAmxSide);
  if (more_columns) tiles.store<1>(sums[0] + kAmxRows, kAmxSide);
  if (more_rows) tiles.store<2>(sums[kAmxRows], kAmxSide);
  if (more_rows && more_columns) tiles.store<3>(sums[kAmxRows] + kAmxRows, kAmxSide);
}

template <const PlanePairs& planes>
void sum_block(AmxTiles& tiles, const char* a, const char* b, int64_t next, int64_t rows, int64_t columns,
               float (&sums)[kAmxSide][kAmxSide]) {
  if (rows > kAmxRows) {
    columns > kAmxRows ? sum_block<planes, true, true>(tiles, a, b, next, sums)
                       : sum_block<planes, true, false>(tiles, a, b, next, sums);
  } else {
    columns > kAmxRows ? sum_block<planes, false, true>(tiles, a, b, next, sums)
                       : sum_block<planes, false, false>(tiles, a, b, next, sums);
  }
}

inline char* packed_rows_scratch() {
  return static_cast<char*>(scratch(Scratch::packed_rows, kAmxPackedRows / kAmxRows * packed_bytes(kBlockK)));
}

inline char* packed_columns_scratch() {
  return static_cast<char*>(scratch(Scratch::packed_columns, kAmxSide / kAmxRows * packed_bytes(kBlockK)));
}

inline void reserve_amx() {
  packed_rows_scratch();
  packed_columns_scratch();
}

// A range piece by piece: for (const Range piece : Pieces(all, size)).
class Pieces {
 public:
  struct Iterator {
    Range rest;
    int64_t size;

    Range operator*() const { return {rest.begin, rest.size() < size ? rest.end : rest.begin + size}; }
    void operator++() { rest.begin = (**this).end; }
    bool operator!=(const Iterator& other) const { return rest.begin != other.rest.begin; }
  };

  Pieces(Range all, int64_t size) : all_(all), size_(size) {}
  Iterator begin() const { return {all_, size_}; }
  Iterator end() const { return {{all_.end, all_.end}, size_}; }

 private:
  Range all_;
  int64_t size_;
};

// For each block of that part of C, and each block of K: store(sums, rows, columns, k), or otherwise(rows, columns, k)
// for some blocks at once whose factors are not for tiles.
template <class Store, class Otherwise>
void for_each_amx_block(const Block<float>& g, Range m, Range n, const Store& store, const Otherwise& otherwise) {
  AmxTiles tiles;
  char *a = packed_rows_scratch(), *b = packed_columns_scratch();
  alignas(64) float sums[kAmxSide][kAmxSide];
  for (const Range packed_rows : Pieces(m, kAmxPackedRows)) {
    for (const Range k : Pieces({0, g.K}, kBlockK)) {
      const int64_t bytes = packed_bytes(k.size());
      Magnitudes of_a;
      pack_planes<Side::a>(g.a, g.relu_mask, packed_rows, k, a, of_a);
      for (const Range columns : Pieces(n, kAmxSide)) {
        Magnitudes of_b;
        pack_planes<Side::b>(g.b, {}, columns, k, b, of_b);
        if (!tiles_are_exact(of_a, of_b)) {
          otherwise(packed_rows, columns, k);
          continue;
        }
        for (const Range rows : Pieces(packed_rows, kAmxSide)) {
          const char* of_rows = a + (rows.begin - packed_rows.begin) / kAmxRows * bytes;
          if (g.allow_tf32) {
            sum_block<kRoundedPairs>(tiles, of_rows, b, bytes, rows.size(), columns.size(), sums);
          } else {
            sum_block<kExactPairs>(tiles, of_rows, b, bytes, rows.size(), columns.size(), sums);
          }
          store(sums, rows, columns, k);
        }
      }
    }
  }
}

// Calls body(row, column, the sums of a vector, lanes) for all of a block.
template <class Body>
MNIST_EXT_INLINE void for_each_sum(const float (&sums)[kAmxSide][kAmxSide], Range rows, Range columns,
                                   const Body& body) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const float* from = sums[row - rows.begin];
    for_each_vector<float>(columns.size(), [&](int64_t i, int lanes) __attribute__((always_inline)) {
      body(row, columns.begin + i, Vec<float>::load(from + i), lanes);
    });
  }
}

// All of C, on the calling thread.
inline void amx_gemm(const Block<float>& g) {
  const auto is_first = [&](Range k) { return k.begin == 0 && !g.accumulate; };
  const auto is_last = [&](Range k) { return k.end == g.K; };
  for_each_amx_block(
      g, {0, g.M}, {0, g.N},
      [&](const auto& sums, Range rows, Range columns, Range k) {
        const bool first = is_first(k), relu = g.relu && is_last(k);
        for_each_sum(sums, rows, columns, [&](int64_t row, int64_t column, Vec<float> sum, int lanes) {
          float* c = g.c + row * g.ldc + column;
          const float* add = first ? (g.bias ? g.bias + column : nullptr) : c;
          if (add) sum = sum + load(add, lanes);
          if (relu) sum = max(Vec<float>{}, sum);  // NaN stays NaN
          store(c, sum, lanes);
        });
      },
      [&](Range rows, Range columns, Range k) {
        Block<float> part = g.part(rows, columns, k);
        part.accumulate = !is_first(k);  // then without bias
        part.relu = g.relu && is_last(k);
        gemm(part);
      });
}

#endif

}  // namespace mnist_ext::MNIST_EXT_ISA
