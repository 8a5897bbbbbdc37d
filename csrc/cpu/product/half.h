// The linear layer for bfloat16 and float16: operands widened to float, the float kernels, results rounded once.
#pragma once

#include "linear_impl.h"
#include "memory.h"

namespace mnist_ext::MNIST_EXT_ISA {

inline constexpr double kConversionGrain = 65536;  // elements that are worth a thread of their own

// body(row) for every row of a matrix, shared among the threads.
template <class Body>
void for_each_row(int64_t rows, int64_t columns, int threads, const Body& body) {
  const double work = static_cast<double>(rows) * static_cast<double>(columns);
  parallel(threads_for(work, kConversionGrain, threads), [&](int thread, int count) {
    const Range share = split(rows, 1, thread, count);
    for (int64_t row = share.begin; row < share.end; ++row) body(row);
  });
}

// A matrix in float for the time of one call. Null if the original is.
template <class T>
class Widened {
 public:
  // Without the elements: for a result.
  Widened(const T* original, int64_t rows, int64_t columns)
      : rows_(rows),
        columns_(columns),
        memory_(original ? rows * columns * sizeof(float) : 0) {}

  Widened(const T* original, int64_t rows, int64_t columns, int64_t stride, int threads)
      : Widened(original, rows, columns) {
    if (!original) return;
    for_each_row(rows, columns, threads, [&](int64_t row) {
      for_each_vector<T>(columns, [&](int64_t c, int lanes) __attribute__((always_inline)) {
        store(data() + row * columns + c, load(original + row * stride + c, lanes), lanes);
      });
    });
  }

  // Of the transpose, if the original is column-major.
  Widened(const MatrixView<T>& m, int64_t rows, int64_t columns, int threads)
      : Widened(m.data, m.column_stride == 1 ? rows : columns, m.column_stride == 1 ? columns : rows,
                m.column_stride == 1 ? m.row_stride : m.column_stride, threads) {
    is_transposed_ = m.column_stride != 1;
  }

  MatrixView<float> view() const {
    return is_transposed_ ? MatrixView<float>{data(), 1, columns_} : MatrixView<float>{data(), columns_, 1};
  }

  float* data() const { return static_cast<float*>(memory_.data()); }

  // Into the contiguous original, if there is one.
  void narrow_to(T* original, int threads) const {
    if (!original) return;
    for_each_row(rows_, columns_, threads, [&](int64_t row) {
      for_each_vector<T>(columns_, [&](int64_t c, int lanes) __attribute__((always_inline)) {
        store(original + row * columns_ + c, load(data() + row * columns_ + c, lanes), lanes);
      });
    });
  }

 private:
  int64_t rows_, columns_;
  bool is_transposed_ = false;
  Temporary memory_;
};

template <class T>
void linear_forward_half(const LinearForward<T>& x, int threads) {
  const Widened<T> input(x.input, x.rows, x.in_features, threads);
  const Widened<T> weight(x.weight, x.out_features, x.in_features, threads);
  const Widened<T> bias(x.bias, 1, x.out_features, x.out_features, threads);
  const Widened<T> out(x.out, x.rows, x.out_features);
  linear_forward<float>({.rows = x.rows,
                         .in_features = x.in_features,
                         .out_features = x.out_features,
                         .input = input.view(),
                         .weight = weight.view(),
                         .bias = bias.data(),
                         .activation = x.activation,
                         .out = out.data()},
                        threads);
  out.narrow_to(x.out, threads);
}

template <class T>
void linear_backward_half(const LinearBackward<T>& x, int threads) {
  const Widened<T> grad_output(x.grad_output, x.rows, x.out_features, x.grad_output_stride, threads);
  const Widened<T> output(x.output, x.rows, x.out_features, x.output_stride, threads);
  const Widened<T> input(x.grad_weight ? x.input : MatrixView<T>{}, x.rows, x.in_features, threads);
  const Widened<T> weight(x.grad_input ? x.weight : MatrixView<T>{}, x.out_features, x.in_features, threads);
  const Widened<T> grad_input(x.grad_input, x.rows, x.in_features);
  const Widened<T> grad_weight(x.grad_weight, x.out_features, x.in_features);
  const Widened<T> grad_bias(x.grad_bias, 1, x.out_features);
  linear_backward<float>({.rows = x.rows,
                          .in_features = x.in_features,
                          .out_features = x.out_features,
                          .grad_output = grad_output.data(),
                          .grad_output_stride = x.out_features,
                          .output = output.data(),
                          .output_stride = x.out_features,
                          .input = input.view(),
                          .weight = weight.view(),
                          .grad_input = grad_input.data(),
                          .grad_weight = grad_weight.data(),
                          .grad_bias = grad_bias.data()},
                         threads);
  grad_input.narrow_to(x.grad_input, threads);
  grad_weight.narrow_to(x.grad_weight, threads);
  grad_bias.narrow_to(x.grad_bias, threads);
}

}  // namespace mnist_ext::MNIST_EXT_ISA
