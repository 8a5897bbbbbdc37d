// Softmax cross-entropy of short rows against class indices: a vector of rows at a time is transposed in registers, so
// that vectors are full and sums over classes are sums of vectors; then as columns.
#pragma once

#include "cross_entropy_columns.h"
#include "transpose.h"

namespace mnist_ext::MNIST_EXT_ISA {

// Rows of up to this many classes; longer ones fill vectors of their own.
template <class T>
inline constexpr int64_t kShortRow = 2 * Register<T>::width;
// Fewer rows than this leave most of a vector of them empty.
inline constexpr int64_t kShortRowsFrom = 8;

// [rows, classes] -> tile [classes, width]; lanes of rows that do not exist hold 0.
template <class T>
void transpose_in(const T* from, int64_t stride, int64_t rows, int64_t classes, ComputeType<T>* tile) {
  using V = Register<T>;
  for_each_vector<T>(classes, [&](int64_t c, int lanes) {
    V block[V::width];
    for (int i = 0; i < V::width; ++i) block[i] = i < rows ? load(from + i * stride + c, lanes) : V{};
    transpose(block);
    for (int i = 0; i < V::width; ++i) block[i].store(tile + (c + i) * V::width);
  });
}

// tile [classes, width] -> [rows, classes], contiguous.
template <class T>
void transpose_out(const ComputeType<T>* tile, int64_t rows, int64_t classes, T* to) {
  using V = Register<T>;
  for_each_vector<T>(classes, [&](int64_t c, int lanes) {
    V block[V::width];
    for (int i = 0; i < V::width; ++i) block[i] = V::load(tile + (c + i) * V::width);
    transpose(block);
    for (int i = 0; i < V::width && i < rows; ++i) store(to + i * classes + c, block[i], lanes);
  });
}

// This thread's share of the rows.
template <class T>
void do_short_rows(const StripWork<T>& work, int thread, int threads) {
  using A = ComputeType<T>;
  constexpr int64_t width = Register<T>::width;
  const CrossEntropyProblem<T>& p = work.problem;
  alignas(64) A tile[kShortRow<T> * width], grad_tile[kShortRow<T> * width];
  const Range share = split(p.batch, width, thread, threads);
  for (int64_t begin = share.begin; begin < share.end; begin += width) {
    const Strip strip = {begin, share.end - begin < width ? share.end - begin : width};
    transpose_in(p.logits.data + begin * p.logits.batch_stride, p.logits.batch_stride, strip.size, p.classes, tile);
    const int lanes = static_cast<int>(strip.size);
    const auto backward = [&](const auto& softmax) {
      backward_vector_of_indices<T, A>(*work.backward, work.q, work.scales, begin, lanes, softmax, {grad_tile, width});
    };
    if (work.forward) {
      const ColumnCoefficients<T> coefficients{work.q, {}, lanes};
      const ColumnTile<A> kept = {work.backward ? grad_tile : nullptr, width};  // the gradient takes their place
      const auto inverse_sum = forward_vector(*work.forward, coefficients, {tile, width}, kept, begin);
      if (work.backward) backward(KeptColumn<T>{kept, inverse_sum});
    } else {
      backward(RecomputedColumn<T, A>(*work.backward, {tile, width}, begin, lanes));
    }
    if (!work.backward) continue;
    transpose_out(grad_tile, strip.size, p.classes, work.backward->grad_logits + begin * p.classes);
  }
}

}  // namespace mnist_ext::MNIST_EXT_ISA
