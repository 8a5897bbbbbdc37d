// Products of bfloat16 and float16: operands widened to float, the float kernels, results rounded once.
#pragma once

#include "../../api/program.h"
#include "../simd/elements.h"
#include "../threads/parallel.h"

namespace mnist_ext::MNIST_EXT_ISA {

inline constexpr double kConversionGrain = 65536;  // elements that are worth a thread of their own

// A contiguous matrix [rows, columns] of float for the time of one call, in place of one of T. Null if that is.
template <class T>
class Widened {
 public:
  // Without the elements: for a result.
  Widened(T* original, int64_t rows, int64_t columns)
      : rows_(original ? rows : 0),
        columns_(columns),
        memory_(rows_ * columns * sizeof(float)) {}

  Widened(const T* original, int64_t rows, int64_t columns, int64_t stride, int threads)
      : Widened(const_cast<T*>(original), rows, columns) {
    for_each_row(threads, [&](int64_t row) {
      for_each_vector<T>(columns, [&](int64_t c, int lanes) __attribute__((always_inline)) {
        store(data() + row * columns + c, load(original + row * stride + c, lanes), lanes);
      });
    });
  }

  // Of an operand of `outer` by K, as it lies: along K or along the other dimension.
  Widened(const Operand<T>& o, int64_t outer, int64_t K, bool along_k, int threads)
      : Widened(o.data, along_k ? outer : K, along_k ? K : outer, along_k ? o.outer_stride : o.k_stride, threads) {
    is_transposed_ = !along_k;
  }

  Operand<float> operand() const {
    return is_transposed_ ? Operand<float>{data(), 1, columns_} : Operand<float>{data(), columns_, 1};
  }

  float* data() const { return static_cast<float*>(memory_.data()); }

  void narrow_to(T* original, int threads) const {
    for_each_row(threads, [&](int64_t row) {
      for_each_vector<T>(columns_, [&](int64_t c, int lanes) __attribute__((always_inline)) {
        store(original + row * columns_ + c, load(data() + row * columns_ + c, lanes), lanes);
      });
    });
  }

 private:
  template <class Body>
  void for_each_row(int threads, const Body& body) const {
    const double work = static_cast<double>(rows_) * static_cast<double>(columns_);
    parallel(threads_for(work, kConversionGrain, threads), [&](int thread, int count) {
      const Range share = split(rows_, 1, thread, count);
      for (int64_t row = share.begin; row < share.end; ++row) body(row);
    });
  }

  int64_t rows_, columns_;
  bool is_transposed_ = false;
  Temporary memory_;
};

// Calls run(product of float).
template <class T, class Run>
void run_widened(const Product<T>& p, int threads, const Run& run) {
  // A and its mask alike, and down the columns where row sums are wanted: both strides of one of them may be 1.
  const bool a_along_k = !p.row_sums && p.a.k_stride == 1 && (!p.relu_mask.data || p.relu_mask.k_stride == 1);
  const Widened<T> a(p.a, p.M, p.K, a_along_k, threads), mask(p.relu_mask, p.M, p.K, a_along_k, threads);
  const Widened<T> b(p.c ? p.b : Operand<T>{}, p.N, p.K, p.b.k_stride == 1, threads),
      bias(p.bias, 1, p.N, p.N, threads);
  const Widened<T> c_mask(p.c_mask, p.M, p.N, p.N, threads);
  const Widened<T> c(p.c, p.M, p.N), row_sums(p.row_sums, 1, p.M);
  run(Product<float>{.M = p.M,
                     .N = p.N,
                     .K = p.K,
                     .a = a.operand(),
                     .relu_mask = mask.operand(),
                     .b = b.operand(),
                     .bias = bias.data(),
                     .relu = p.relu,
                     .c_mask = c_mask.data(),
                     .c = c.data(),
                     .row_sums = row_sums.data()});
  c.narrow_to(p.c, threads);
  row_sums.narrow_to(p.row_sums, threads);
}

}  // namespace mnist_ext::MNIST_EXT_ISA
