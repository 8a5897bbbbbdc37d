// Softmax cross-entropy of short rows: a vector of rows at a time is transposed in registers, so that vectors are full
// and sums over classes are sums of vectors; then as columns.
#pragma once

#include "../simd/transpose.h"
#include "columns.h"

namespace mnist_ext::MNIST_EXT_ISA {

// Rows of up to this many classes; longer ones fill vectors of their own.
template <class T>
inline constexpr int64_t kShortRow = 4 * Register<T>::width;
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
void do_short_rows(const CrossEntropyWork<T>& work, int thread, int threads) {
  using A = ComputeType<T>;
  constexpr int64_t width = Register<T>::width;
  const CrossEntropyProblem<T>& p = work.problem;
  alignas(64) A tiles[4][kShortRow<T> * width];
  const Range share = split(p.batch, width, thread, threads);
  for (int64_t begin = share.begin; begin < share.end; begin += width) {
    const int64_t rows = share.end - begin < width ? share.end - begin : width;
    const auto in = [&](const ClassScores<const T>& from, A* tile) -> StripScores<const A> {
      if (!from.data) return {};
      transpose_in(from.data + begin * from.batch_stride, from.batch_stride, rows, p.classes, tile);
      return {tile, width};
    };
    const auto room = [](const T* gradient, A* tile) -> StripScores<A> { return {gradient ? tile : nullptr, width}; };
    const auto out = [&](const StripScores<A>& tile, T* gradient) {
      if (gradient) transpose_out(tile.data, rows, p.classes, gradient + begin * p.classes);
    };
    StripTensors<A> at = {in(p.logits, tiles[0]), in(p.probabilities, tiles[1]), {}, {}};
    if (work.backward) {
      at.grad_logits = room(work.backward->grad_logits, tiles[2]);
      at.grad_probabilities = room(work.backward->grad_probabilities, tiles[3]);
    }
    // Exponentials are kept where the gradient then takes their place.
    do_vector(work, begin, static_cast<int>(rows), at, {at.logits.data, width}, {at.grad_logits.data, width});
    if (!work.backward) continue;
    out(at.grad_logits, work.backward->grad_logits);
    out(at.grad_probabilities, work.backward->grad_probabilities);
  }
}

}  // namespace mnist_ext::MNIST_EXT_ISA
