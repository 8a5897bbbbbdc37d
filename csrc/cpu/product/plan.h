// Which kernel makes a product, and which part of it each thread makes.
#pragma once

#include "amx_gemm.h"
#include "dot_gemm.h"

namespace mnist_ext::MNIST_EXT_ISA {

// Which kernel is faster, measured by benchmarks/products.py. Dot products save the packing, which few rows do not pay
// back, and pay with sums over lanes, which a small K does not pay back, and with reading a weight that fits in no
// cache more often; of few columns, outer products leave part of a tile empty. With vectors of 128 bits an outer
// product's broadcasts are no loads, and cost more than the sums.
template <class T>
bool use_dot_products(int64_t M, int64_t N, int64_t K) {
  constexpr bool large_tiles = kVectorRegisters == 32;
  constexpr int64_t large_weight = int64_t{8} << 20;  // bytes
  if (K < Vec<T>::width && N >= 64 * Vec<T>::width) return false;
  if (kVectorBytes == 16 || N <= kDotColumns) return true;
  if (N < 2 * Vec<T>::width) return M <= 512 || K > 128;
  if (K <= 16 * Vec<T>::width) return M < (large_tiles ? 128 : 64);
  return M <= (K * N * static_cast<int64_t>(sizeof(T)) < large_weight ? 192 : 96);
}

enum class Kernel { outer_products, dot_products, amx };

// By the sizes of the whole product, so that the bits do not depend on the number of threads. Dot products read B along
// K: of a forward a row-major weight, of a backward what lies column by column.
template <class T>
Kernel kernel_of(const Block<T>& g) {
  if (use_amx<T>(g.M, g.N, g.K)) return Kernel::amx;
  const bool along_k = g.b.k_stride == 1 && g.b.outer_stride != 1;
  return along_k && use_dot_products<T>(g.M, g.N, g.K) ? Kernel::dot_products : Kernel::outer_products;
}

// Columns of C that are made together.
template <class T>
constexpr int64_t column_unit(Kernel kernel) {
  return kernel == Kernel::amx ? kAmxSide : kernel == Kernel::dot_products ? kDotColumns : Vec<T>::width;
}

template <class T>
auto function_of(Kernel kernel) {
#if defined(MNIST_EXT_AMX)
  if constexpr (std::is_same_v<T, float>) {
    if (kernel == Kernel::amx) return amx_gemm;
  }
#endif
  return kernel == Kernel::dot_products ? dot_gemm<T> : gemm<T>;
}

// A single column is computed as a row by outer products, where A lies column by column or has short rows.
template <class T>
bool is_better_transposed(const Block<T>& g) {
  return g.N == 1 && g.M > 1 && g.ldc == 1 && !g.relu_mask.data &&
         (g.a.k_stride != 1 || !use_dot_products<T>(1, g.M, g.K));
}

// Asks scratch() for all that a product stored to C will.
template <class T>
void reserve_product([[maybe_unused]] Kernel kernel) {
  a_tiles_scratch<T>();
  b_block_scratch<T>();
  piece_scratch<T>();
#if defined(MNIST_EXT_AMX)
  if (kernel == Kernel::amx) reserve_amx();
#endif
}

// The mask of C, while that part is in the cache.
template <class T>
void mask_part(const Block<T>& g, Range rows, Range columns) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t begin = row * g.ldc + columns.begin;
    for_each_vector<T>(columns.size(), [&](int64_t i, int lanes) __attribute__((always_inline)) {
      const auto masked = where_positive(load(g.c_mask + begin + i, lanes), load(g.c + begin + i, lanes));
      store(g.c + begin + i, masked, lanes);
    });
  }
}

// That part of C, on the calling thread.
template <class T>
void product_part(const Block<T>& g, Kernel kernel, Range rows, Range columns) {
  if (rows.size() == 0 || columns.size() == 0) return;
  multiply_in_pieces(g, rows, columns, function_of<T>(kernel));
  if (g.c_mask) mask_part(g, rows, columns);
}
template <class T>
void product_part(const Block<T>& g, Range rows, Range columns) {
  if (is_better_transposed(g)) return product_part(g.transposed(), columns, rows);
  product_part(g, kernel_of(g), rows, columns);
}

// How many of `threads` to give to the rows of C, the rest to its columns. Of dot products all to the columns, unless
// each thread would have to pack A: each reads its own part of the weights, which stays in its core's cache from one
// step of training to the next. Of outer products all to the rows: threads that share a row of C write to neighbouring
// cache lines. Otherwise where the busiest thread has less to do, counted in tiles of one vector: to read, pack
// or split a tile of rows of A, or a vector of columns of B, costs as much as so many of them. B costs less while it
// fits into the second-level cache, more where it is transposed, and most from memory.
template <class T>
int row_threads(const Block<T>& g, Kernel kernel, int threads) {
  if (threads == 1) return 1;
  constexpr double cached = 2 << 20, huge = 32 << 20;  // bytes
  const bool dots = kernel == Kernel::dot_products, amx = kernel == Kernel::amx;
  const auto tiles = [](int64_t n, int64_t unit) { return (n + unit - 1) / unit; };
  const int64_t row_tiles = tiles(g.M, amx ? kAmxSide : dots ? kDotRows : kTileRows);
  const int64_t column_tiles = tiles(g.N, column_unit<T>(kernel));
  const double b_bytes = static_cast<double>(g.K * g.N) * sizeof(T);
  const double packing = b_bytes > huge ? 8 : g.b.outer_stride == 1 ? 4 : 6;
  const double of_rows = amx ? 1.6 : dots ? 0 : g.packs_a() ? 3 : 1;
  const double of_columns = amx ? 1.6 : dots ? 0 : packing * (b_bytes < cached ? b_bytes / cached : 1);
  int best = 0;
  double best_cost = 0;
  for (int divisor = 1; divisor <= threads; ++divisor) {
    if (threads % divisor != 0) continue;
    const int by_row = dots && !g.packs_a() ? divisor : threads / divisor;
    const auto rows = static_cast<double>(tiles(row_tiles, by_row));
    const auto columns = static_cast<double>(tiles(column_tiles, threads / by_row));
    const double cost = rows * columns + of_rows * rows + of_columns * columns;
    if (divisor == 1 || cost < (dots ? 0.95 : 0.98) * best_cost) {
      best = by_row;
      best_cost = cost;
    }
  }
  return best;
}

// What thread `thread` of `count` does of the whole product.
template <class T>
void product_share(const Block<T>& g, Kernel kernel, int thread, int count) {
  const int by_row = row_threads(g, kernel, count), by_column = count / by_row;
  product_part(g, kernel, split(g.M, kernel == Kernel::amx ? kAmxSide : 1, thread / by_column, by_row),
               split(g.N, column_unit<T>(kernel), thread % by_column, by_column));
}

template <class T>
void product_share(const Block<T>& g, int thread, int count) {
  if (is_better_transposed(g)) return product_share(g.transposed(), thread, count);
  product_share(g, kernel_of(g), thread, count);
}

// Multiply-adds of a product, as far as they cost time: to read or write a matrix costs as much as to multiply it with
// so many rows (benchmarks/training.py, batch 1).
template <class T>
double multiply_adds(const Product<T>& p) {
  constexpr int64_t kFewestRows = 8;
  const auto counted = [](int64_t n) { return static_cast<double>(n == 0 || n > kFewestRows ? n : kFewestRows); };
  return counted(p.M) * static_cast<double>(p.N) * counted(p.K);
}

}  // namespace mnist_ext::MNIST_EXT_ISA
