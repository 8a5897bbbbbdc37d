// Softmax cross-entropy of rows of logits against class indices, mean, forward and backward: from a pass per operation
// to csrc/cpu/cross_entropy/rows.h and columns.h. Once for 4096x1000, which is more than the second-level cache
// holds, and once for 4096x10, where a row is less than a vector.
//
//   pass_per_op        each operation reads and writes whole matrices; the exponential is libm's
//   pass_per_direction one pass forward, which keeps two numbers per row, and one backward
//   vector_exp         in vectors, with an exponential by a polynomial of degree 7
//   row_in_cache       a row's gradient while the row is in the first-level cache
//   one_exp            the exponentials are kept, where the gradient will be
//   fetched_powers     (AVX-512) the exponential of exp_log.h: powers of 2 from a register and a polynomial of degree 3
//   transposed         (short rows) a vector of rows at a time, transposed in registers: vectors are full
//   threads            each its share of the rows
//   cross_entropy      the kernel in use
//
//   python benchmarks/ladder/ladder.py cross_entropy
//
// Finite logits only, and no more than one block of each row's sum: what the kernel in use does beyond is in
// cross_entropy.h.
#include "../../csrc/cpu/cross_entropy/cross_entropy.h"

#include "ladder.h"

namespace {

using namespace ladder;
using V = Vec<float>;

constexpr float kLowest = -std::numeric_limits<float>::infinity();

struct Problem {
  int64_t rows, classes;
  const float* logits;                      // [rows, classes]
  const int64_t* target;                    // [rows]
  float *loss, *grad;                       // [1], [rows, classes]
  float *row_loss, *row_max, *row_log_sum;  // [rows]
  float *log_p, *exponentials;              // [rows, classes], for pass_per_op

  float scale() const { return 1 / static_cast<float>(rows); }
};

void mean_loss(const Problem& x) {
  double sum = 0;
  for (int64_t i = 0; i < x.rows; ++i) sum += x.row_loss[i];
  *x.loss = static_cast<float>(sum / static_cast<double>(x.rows));
}

// As the ops of a framework do it. Matrices are counted as they pass: 14 reads and writes.
void pass_per_op(const Problem& x) {
  const int64_t rows = x.rows, classes = x.classes;
  for (int64_t i = 0; i < rows; ++i) {  // max: 1
    x.row_max[i] = kLowest;
    for (int64_t c = 0; c < classes; ++c) x.row_max[i] = std::max(x.row_max[i], x.logits[i * classes + c]);
  }
  for (int64_t i = 0; i < rows; ++i) {  // logits - max: 2
    for (int64_t c = 0; c < classes; ++c) x.log_p[i * classes + c] = x.logits[i * classes + c] - x.row_max[i];
  }
  for (int64_t j = 0; j < rows * classes; ++j) x.exponentials[j] = std::exp(x.log_p[j]);  // 2
  for (int64_t i = 0; i < rows; ++i) {                                                    // sum: 1
    float sum = 0;
    for (int64_t c = 0; c < classes; ++c) sum += x.exponentials[i * classes + c];
    x.row_log_sum[i] = std::log(sum);
  }
  for (int64_t i = 0; i < rows; ++i) {  // - log_sum: 2
    for (int64_t c = 0; c < classes; ++c) x.log_p[i * classes + c] -= x.row_log_sum[i];
  }
  for (int64_t i = 0; i < rows; ++i) x.row_loss[i] = -x.log_p[i * classes + x.target[i]];
  mean_loss(x);
  // Backward: the gradient of log_p is 0 but at the targets: 1. That of the logits: 1 and 4.
  std::memset(x.grad, 0, rows * classes * sizeof(float));
  for (int64_t i = 0; i < rows; ++i) x.grad[i * classes + x.target[i]] = -x.scale();
  for (int64_t i = 0; i < rows; ++i) {
    x.row_max[i] = 0;
    for (int64_t c = 0; c < classes; ++c) x.row_max[i] += x.grad[i * classes + c];
  }
  for (int64_t j = 0; j < rows * classes; ++j) x.exponentials[j] = std::exp(x.log_p[j]);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < classes; ++c) x.grad[i * classes + c] -= x.exponentials[i * classes + c] * x.row_max[i];
  }
}

// exp(x) for x <= 0, as exp_log.h has it where no permutation fetches powers of 2.
struct ByPolynomial {
  static MNIST_EXT_INLINE V exp(V x) {
    using C = ExpConstants<float>;
    const V magic = V::broadcast(C::round_magic), n = fma(x, V::broadcast(1.4426950408889634f), magic) - magic;
    V r = fma(n, V::broadcast(-C::ln2_high), x);
    r = fma(n, V::broadcast(-C::ln2_low), r);
    V p = V::broadcast(static_cast<float>(inverse_factorial(7)));
#pragma GCC unroll 8
    for (int k = 6; k >= 0; --k) p = fma(p, r, V::broadcast(static_cast<float>(inverse_factorial(k))));
    return scale_by_power(p, n, x);
  }
};

struct InUse {
  static MNIST_EXT_INLINE V exp(V x) { return MNIST_EXT_ISA::exp(x); }
};

// What the backward needs to know of a row.
struct Forward {
  float max, log_sum;
};

struct Scalar {
  static Forward forward(const float* row, int64_t classes) {
    float max = kLowest, sum = 0;
    for (int64_t c = 0; c < classes; ++c) max = std::max(max, row[c]);
    for (int64_t c = 0; c < classes; ++c) sum += std::exp(row[c] - max);
    return {max, std::log(sum)};
  }
  static void backward(const float* row, int64_t classes, Forward f, float scale, float* grad) {
    for (int64_t c = 0; c < classes; ++c) grad[c] = scale * std::exp((row[c] - f.max) - f.log_sum);
  }
};

float row_max(const float* row, int64_t classes) {
  V max = V::broadcast(kLowest);
  for_each_vector<float>(classes, [&](int64_t c, int lanes) __attribute__((always_inline)) {
    max = MNIST_EXT_ISA::max(load(row + c, lanes, kLowest), max);
  });
  return reduce_max(max);
}

struct Vectors {
  static Forward forward(const float* row, int64_t classes) {
    const float max = row_max(row, classes);
    V sum{};
    for_each_vector<float>(classes, [&](int64_t c, int lanes) __attribute__((always_inline)) {
      sum = sum + ByPolynomial::exp(load(row + c, lanes, kLowest) - V::broadcast(max));  // exp(-inf) is 0
    });
    return {max, std::log(reduce_add(sum))};
  }
  static void backward(const float* row, int64_t classes, Forward f, float scale, float* grad) {
    for_each_vector<float>(classes, [&](int64_t c, int lanes) __attribute__((always_inline)) {
      const V p = ByPolynomial::exp((load(row + c, lanes) - V::broadcast(f.max)) - V::broadcast(f.log_sum));
      store(grad + c, V::broadcast(scale) * p, lanes);
    });
  }
};

template <class How>
void forward_row(const Problem& x, int64_t i) {
  const float* row = x.logits + i * x.classes;
  const Forward f = How::forward(row, x.classes);
  x.row_max[i] = f.max;
  x.row_log_sum[i] = f.log_sum;
  x.row_loss[i] = f.log_sum - (row[x.target[i]] - f.max);
}

template <class How>
void backward_row(const Problem& x, int64_t i) {
  float* grad = x.grad + i * x.classes;
  How::backward(x.logits + i * x.classes, x.classes, {x.row_max[i], x.row_log_sum[i]}, x.scale(), grad);
  grad[x.target[i]] -= x.scale();
}

template <class How>
void pass_per_direction(const Problem& x) {
  for (int64_t i = 0; i < x.rows; ++i) forward_row<How>(x, i);
  mean_loss(x);
  for (int64_t i = 0; i < x.rows; ++i) backward_row<How>(x, i);
}

void row_in_cache(const Problem& x) {
  for (int64_t i = 0; i < x.rows; ++i) {
    forward_row<Vectors>(x, i);
    backward_row<Vectors>(x, i);
  }
  mean_loss(x);
}

// exp(logit - max) is what the forward adds up and, times 1 / sum, the backward's probability.
template <class How>
void one_exp(const Problem& x, Range rows) {
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const float* row = x.logits + i * x.classes;
    float* grad = x.grad + i * x.classes;
    const float max = row_max(row, x.classes);
    V sums{};
    for_each_vector<float>(x.classes, [&](int64_t c, int lanes) __attribute__((always_inline)) {
      const V e = How::exp(load(row + c, lanes, kLowest) - V::broadcast(max));
      store(grad + c, e, lanes);
      sums = sums + e;
    });
    const float sum = reduce_add(sums);
    x.row_loss[i] = std::log(sum) - (row[x.target[i]] - max);
    const V factor = V::broadcast(x.scale() / sum);
    for_each_vector<float>(x.classes, [&](int64_t c, int lanes) __attribute__((always_inline)) {
      store(grad + c, load(grad + c, lanes) * factor, lanes);
    });
    grad[x.target[i]] -= x.scale();
  }
}

constexpr int64_t kFewClasses = 16;

// A lane is a row, a vector is a class: its maxima, sums and logarithms are a vector's, not a row's.
void transposed(const Problem& x, Range rows) {
  constexpr int64_t width = V::width;
  alignas(kVectorBytes) float tile[(kFewClasses + width) * width];  // [classes][rows]
  const V scale = V::broadcast(x.scale());
  for (int64_t begin = rows.begin; begin < rows.end; begin += width) {
    const float* logits = x.logits + begin * x.classes;
    float* grad = x.grad + begin * x.classes;
    V block[width];
    for_each_vector<float>(x.classes, [&](int64_t c, int lanes) {
      for (int64_t i = 0; i < width; ++i) block[i] = load(logits + i * x.classes + c, lanes);
      transpose(block);
      for (int64_t i = 0; i < width; ++i) block[i].store(tile + (c + i) * width);
    });

    V::RawBits targets;
    for (int64_t i = 0; i < width; ++i) targets[i] = static_cast<int32_t>(x.target[begin + i]);
    const auto at_target = [&](int64_t c, V a, V b) -> V {
      return {targets == static_cast<int32_t>(c) ? a.raw : b.raw};
    };
    V max = V::broadcast(kLowest), sum{}, logit{};
    for (int64_t c = 0; c < x.classes; ++c) max = MNIST_EXT_ISA::max(V::load(tile + c * width), max);
    for (int64_t c = 0; c < x.classes; ++c) {
      const V difference = V::load(tile + c * width) - max;
      logit = at_target(c, difference, logit);
      const V e = exp(difference);
      e.store(tile + c * width);
      sum = sum + e;
    }
    (log(sum) - logit).store(x.row_loss + begin);
    const V factor = scale / sum;
    for (int64_t c = 0; c < x.classes; ++c) {
      const V g = V::load(tile + c * width) * factor;
      at_target(c, g - scale, g).store(tile + c * width);
    }

    for_each_vector<float>(x.classes, [&](int64_t c, int lanes) {
      for (int64_t i = 0; i < width; ++i) block[i] = V::load(tile + (c + i) * width);
      transpose(block);
      for (int64_t i = 0; i < width; ++i) store(grad + i * x.classes + c, block[i], lanes);
    });
  }
}

// Body: what does a range of rows.
template <class Body>
void threads(const Problem& x, int threads, const Body& body) {
  parallel(threads, [&](int thread, int count) { body(x, split(x.rows, V::width, thread, count)); });
  mean_loss(x);
}

void cross_entropy(const Problem& x, float* workspace, int threads) {
  MNIST_EXT_ISA::cross_entropy_forward<float>({.problem = {.batch = x.rows,
                                                           .classes = x.classes,
                                                           .positions = 1,
                                                           .logits = {x.logits, x.classes, 1},
                                                           .kind = TargetKind::indices,
                                                           .target = {x.target, ClassIndices::Type::int64},
                                                           .probabilities = {},
                                                           .weight = nullptr,
                                                           .ignore_index = -100,
                                                           .label_smoothing = 0,
                                                           .reduction = Reduction::mean},
                                               .loss = x.loss,
                                               .grad_logits = x.grad},
                                              workspace, {.threads = threads});
}

void climb(int64_t rows, int64_t classes, const Options& options) {
  Buffer logits(rows * classes), grad(rows * classes), log_p(rows * classes), exponentials(rows * classes);
  Buffer loss(1), row_loss(rows), row_max(rows), row_log_sum(rows), workspace(3 * rows);
  for (int64_t j = 0; j < logits.size; ++j) logits.data[j] *= 10;
  std::vector<int64_t> target(rows);
  for (int64_t& t : target) t = std::rand() % classes;
  const Problem x = {rows,          classes,      logits.data,      target.data(), loss.data,        grad.data,
                     row_loss.data, row_max.data, row_log_sum.data, log_p.data,    exponentials.data};
  const int n = options.threads;

  std::vector<double> loss_truth(1), grad_truth(rows * classes);
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = x.logits + i * classes;
    double sum = 0;
    for (int64_t c = 0; c < classes; ++c) sum += std::exp(double{row[c]});
    loss_truth[0] += (std::log(sum) - row[target[i]]) / static_cast<double>(rows);
    for (int64_t c = 0; c < classes; ++c) {
      grad_truth[i * classes + c] = (std::exp(double{row[c]}) / sum - (c == target[i])) / static_cast<double>(rows);
    }
  }

  // At least: each logit is read, each element of the gradient is written.
  const int64_t bytes = 2 * rows * classes * 4;
  Ladder ladder("cross-entropy forward and backward, " + std::to_string(rows) + "x" + std::to_string(classes), "GB/s",
                static_cast<double>(bytes));
  ladder.expect(loss, std::move(loss_truth));
  ladder.expect(grad, std::move(grad_truth));
  ladder.copy_limit(1, bytes);
  if (n > 1) ladder.copy_limit(n, bytes);
  ladder.rung("pass_per_op", 1, [=] { pass_per_op(x); });
  ladder.rung("pass_per_direction", 1, [=] { pass_per_direction<Scalar>(x); });
  ladder.rung("vector_exp", 1, [=] { pass_per_direction<Vectors>(x); });
  ladder.rung("row_in_cache", 1, [=] { row_in_cache(x); });
  ladder.rung("one_exp", 1, [=] { threads(x, 1, one_exp<ByPolynomial>); });
  if (kFetchesPowers) ladder.rung("fetched_powers", 1, [=] { threads(x, 1, one_exp<InUse>); });
  const bool short_rows = classes <= kFewClasses;
  if (short_rows) ladder.rung("transposed", 1, [=] { threads(x, 1, transposed); });
  if (n > 1) ladder.rung("threads", n, [=] { threads(x, n, short_rows ? transposed : one_exp<InUse>); });
  float* const of_kernel = workspace.data;
  ladder.rung("cross_entropy", n, [=] { cross_entropy(x, of_kernel, n); });
  ladder.run(options);
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  const int64_t rows = options.quick() ? 16 * V::width : 4096;
  climb(rows, 1000, options);
  climb(rows, 10, options);
}
