// Softmax cross-entropy where the positions are contiguous ([N, C, height, width]): a vector holds one class of
// neighbouring positions, so that sums over classes are sums of vectors and nothing is transposed.
#pragma once

#include "../threads/scratch.h"
#include "terms.h"

namespace mnist_ext::MNIST_EXT_ISA {

// Positions are handled in strips, all classes of a strip at once. A strip is a few vectors wide, as far as its logits
// stay in the second-level cache.
inline constexpr int kStripVectors = 4;
inline constexpr int64_t kStripBytes = 256 * 1024;
// Terms that are added up before their sum joins the total.
inline constexpr int64_t kClassBlock = 128;

template <class T>
int64_t strip_width(int64_t classes) {
  const int64_t fitting = kStripBytes / ((classes < 1 ? 1 : classes) * kVectorBytes);
  return (fitting < 1 ? 1 : fitting < kStripVectors ? fitting : kStripVectors) * Register<T>::width;
}

// Some positions, a class of them at a time.
template <class T>
struct Column {
  using V = Register<T>;

  int64_t classes;
  int lanes;  // positions

  template <class S>
  static MNIST_EXT_INLINE S* at(const Scores<S>& scores, int64_t c) {
    return scores.data + c * scores.class_stride;
  }
  static MNIST_EXT_INLINE V weights(const T* weight, int64_t c, int) { return V::broadcast(load_one(weight + c)); }
  MNIST_EXT_INLINE V statistics(const ComputeType<T>* x) const { return load(x, lanes); }
  template <class Body>
  MNIST_EXT_INLINE void for_each(const Body& body) const {
    for (int64_t c = 0; c < classes; ++c) body(c, lanes);
  }
  // Four independent chains in each block, which round less than one.
  template <class F>
  MNIST_EXT_INLINE V sum(const F& f) const {
    V total{};
    for (int64_t begin = 0; begin < classes; begin += kClassBlock) {
      const int64_t end = classes - begin < kClassBlock ? classes : begin + kClassBlock;
      V sums[4] = {};
      int64_t c = begin;
      for (; c + 4 <= end; c += 4) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) sums[k] = sums[k] + f(c + k, lanes);
      }
      for (; c < end; ++c) sums[3] = sums[3] + f(c, lanes);
      total = total + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    return total;
  }
};

// The targets of a vector of positions. What belongs to the target class is picked by comparison while a loop passes
// all classes: no gather, no scatter. (32 bits of a class are enough: more classes than that do not fit into the
// strip.)
template <class T>
struct VectorOfTargets {
  using A = ComputeType<T>;
  using V = Register<T>;
  using Bits = typename V::Bits;

  typename V::RawBits index;  // -1 where ignored
  V counts{};                 // 1, or 0 where ignored

  VectorOfTargets(const CrossEntropyProblem<T>& p, int64_t position, int lanes) {
    alignas(kVectorBytes) Bits indices[V::width];
    for (int i = 0; i < V::width; ++i) {
      const int64_t t = i < lanes ? p.target[position + i] : p.ignore_index;
      indices[i] = t == p.ignore_index ? Bits(-1) : static_cast<Bits>(t);
    }
    std::memcpy(&index, indices, sizeof(index));
    const typename V::Raw none{};
    counts.raw = index == Bits(-1) ? none : none + A(1);
  }

  // x where c is the target, else y.
  MNIST_EXT_INLINE V pick(int64_t c, V x, V y) const { return {index == static_cast<Bits>(c) ? x.raw : y.raw}; }

  V weight(const Coefficients<T>& q, int64_t classes) const {
    V weight = V::broadcast(A(1));
    if (!q.weight) return weight;
    for (int64_t c = 0; c < classes; ++c) weight = pick(c, V::broadcast(q.weight_of(c)), weight);
    return weight;
  }
};

// One vector of positions. exponentials: exp(logit - max) to be kept there; or data null. Returns 1 / their sum.
template <class T, class S>
Register<T> forward_vector(const CrossEntropyWork<T>& work, int64_t position, const Column<T>& along,
                           Scores<const S> probabilities, Scores<const ComputeType<T>> logits,
                           Scores<ComputeType<T>> exponentials) {
  using A = ComputeType<T>;
  using V = Register<T>;
  const CrossEntropyProblem<T>& p = work.problem;
  const Coefficients<T>& q = work.q;
  const int lanes = along.lanes;
  const bool indexed = p.kind == TargetKind::indices;

  V max = V::broadcast(-std::numeric_limits<A>::infinity());
  for (int64_t c = 0; c < p.classes; ++c) max = mnist_ext::MNIST_EXT_ISA::max(logits.vector(c), max);
  const V sum = along.sum([&](int64_t c, int) __attribute__((always_inline)) {
    const V e = exp(logits.vector(c) - max);
    if (exponentials.data) e.store(exponentials.data + c * exponentials.class_stride);
    return e;
  });
  V log_sum = log(sum);
  V loss{};
  if (!indexed || q.smoothed) {
    const VectorOfCoefficients<T, S, Column<T>> coefficients{q, probabilities, along};
    loss = V{} - along.sum([&](int64_t c, int n) __attribute__((always_inline)) {
      return coefficients(c, n) * ((logits.vector(c) - max) - log_sum);
    });
  }
  if (indexed) {
    const VectorOfTargets<T> targets(p, position, lanes);
    V logit{};
    for (int64_t c = 0; c < p.classes; ++c) logit = targets.pick(c, logits.vector(c), logit);
    const V target_loss = (V{} - ((logit - max) - log_sum)) * targets.weight(q, p.classes);
    loss = q.smoothed ? fma(V::broadcast(q.target), target_loss, loss) : target_loss;
    max = where_positive(targets.counts, max);
    log_sum = where_positive(targets.counts, log_sum);
    loss = where_positive(targets.counts, loss);
  }
  const PositionResults<T>& results = *work.forward;
  store(results.max + position, max, lanes);
  store(results.log_sum + position, log_sum, lanes);
  store(results.loss + position, loss, lanes);
  return V::broadcast(A(1)) / sum;
}

// By value: as far as the compiler knows, the stores might change what lies behind a reference.
template <class T, class S, class Softmax>
MNIST_EXT_INLINE void backward_vector_of_indices(const CrossEntropyWork<T>& work, int64_t position, int lanes,
                                                 Softmax softmax, Scores<S> grad) {
  using A = ComputeType<T>;
  using V = Register<T>;
  const CrossEntropyProblem<T>& p = work.problem;
  const Coefficients<T>& q = work.q;
  const int64_t classes = p.classes;
  const bool smoothed = q.smoothed;
  const VectorOfTargets<T> targets(p, position, lanes);
  const V scale = work.scales.vector(position, lanes);
  const V of_target = scale * V::broadcast(q.target) * targets.weight(q, classes);
  const V of_all = smoothed ? fma(scale, V::broadcast(q.every_summed), of_target) : of_target;
  for (int64_t c = 0; c < classes; ++c) {
    const V p_c = softmax(c, lanes);
    V g, at_target;
    if (smoothed) {
      g = of_all * p_c - uncontracted(scale * V::broadcast(q.every * q.weight_of(c)));
      at_target = g - of_target;
    } else {
      g = of_all * p_c;
      at_target = of_target * (p_c - V::broadcast(A(1)));  // from p - 1: not lost to rounding as p approaches 1
    }
    g = where_positive(targets.counts, targets.pick(c, at_target, g));
    store(grad.data + c * grad.class_stride, g, lanes);
  }
}

// One vector of positions; inlined, so that `lanes` is a constant for all but the last. widened: the logits, for the
// forward; kept: room for exponentials, for both.
template <class T, class S>
MNIST_EXT_INLINE void do_vector(const CrossEntropyWork<T>& work, int64_t position, int lanes,
                                const PositionTensors<S>& at, Scores<const ComputeType<T>> widened,
                                Scores<ComputeType<T>> kept) {
  using V = Register<T>;
  const Column<T> along{work.problem.classes, lanes};
  const auto backward = [&](const auto& softmax) __attribute__((always_inline)) {
    if (work.problem.kind == TargetKind::indices) {
      return backward_vector_of_indices(work, position, lanes, softmax, at.grad_logits);
    }
    const V scale = work.scales.vector(position, lanes), minus_scale = V{} - scale * V::broadcast(work.q.target);
    backward_of_probabilities(work, at, along, softmax, position, scale, minus_scale);
  };
  if (work.forward) {
    const V inverse_sum = forward_vector(work, position, along, at.probabilities, widened, kept);
    if (work.backward) backward(KeptSoftmax<T, Column<T>>{{kept.data, kept.class_stride}, along, inverse_sum});
  } else {
    backward(RecomputedSoftmax<T, S, Column<T>>(*work.backward, at.logits, along, position));
  }
}

// `size` positions, the first of them at `position` in [batch, positions].
template <class T>
void do_strip(const CrossEntropyWork<T>& work, int64_t position, int64_t size, const PositionTensors<T>& at) {
  using A = ComputeType<T>;
  constexpr int64_t vector = Register<T>::width;
  const int64_t classes = work.problem.classes, width = strip_width<T>(classes);
  Scores<A> tile{};
  Scores<A> kept{};
  if (work.forward) {
    // A copy: read from memory once, though three times over, and not where power-of-two strides evict one another.
    tile = {static_cast<A*>(scratch(Scratch::logits_tile, classes * width * sizeof(A))), width};
    for (int64_t c = 0; c < classes; ++c) {
      for_each_vector<T>(size, [&](int64_t s, int lanes) __attribute__((always_inline)) {
        load(at.logits.data + c * at.logits.class_stride + s, lanes).store(tile.data + c * width + s);
      });
    }
    if (work.backward) {
      kept = {static_cast<A*>(scratch(Scratch::exponentials, classes * vector * sizeof(A))), vector};
    }
  }
  for_each_vector<T>(size, [&](int64_t s, int lanes) __attribute__((always_inline)) {
    do_vector(work, position + s, lanes, at.from(s), {tile.from(s).data, width}, kept);
  });
}

// This thread's share of contiguous positions.
template <class T>
void do_columns(const CrossEntropyWork<T>& work, int thread, int threads) {
  const CrossEntropyProblem<T>& p = work.problem;
  const int64_t width = strip_width<T>(p.classes), strips = (p.positions + width - 1) / width;
  const Range share = split(p.batch * strips, 1, thread, threads);
  for (int64_t i = share.begin; i < share.end; ++i) {
    const int64_t batch = i / strips, begin = i % strips * width;
    const int64_t size = p.positions - begin < width ? p.positions - begin : width;
    do_strip(work, batch * p.positions + begin, size, tensors_at(work, batch, begin));
  }
}

// Short rows: a vector of rows at a time is transposed in registers, so that vectors are full and sums over classes are
// sums of vectors; then as columns.

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
    const auto in = [&](const ClassScores<const T>& from, A* tile) -> Scores<const A> {
      if (!from.data) return {};
      transpose_in(from.data + begin * from.batch_stride, from.batch_stride, rows, p.classes, tile);
      return {tile, width};
    };
    const auto room = [](const T* gradient, A* tile) -> Scores<A> { return {gradient ? tile : nullptr, width}; };
    const auto out = [&](const Scores<A>& tile, T* gradient) {
      if (gradient) transpose_out(tile.data, rows, p.classes, gradient + begin * p.classes);
    };
    PositionTensors<A> at = {in(p.logits, tiles[0]), in(p.probabilities, tiles[1]), {}, {}};
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
