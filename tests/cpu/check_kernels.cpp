// The CPU's kernels without Python and torch, against plain loops in double: for a processor that torch is not at hand
// for (make aarch64), and for another compiler. Every instruction set that the processor has, every dtype, all tails of
// vectors; the bits on several threads are those on one. The tests in Python try far more cases, on x86-64.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/simd/elements.h"
#include "../../csrc/cpu/simd/tanh.h"

using namespace mnist_ext;

namespace {

int failures = 0;
int64_t checks = 0;

void expect(bool good, const std::string& what, const char* part, double got, double truth) {
  ++checks;
  if (good) return;
  if (++failures <= 20) std::printf("FAILED %s, %s: got %.9g, expected %.9g\n", what.c_str(), part, got, truth);
}

// Half types by arithmetic, not by the kernels' bits: so many bits of mantissa behind the leading one.
template <class T>
constexpr int kMantissa = std::is_same_v<T, BFloat16> ? 7 : 10;
template <class T>
constexpr int kBias = std::is_same_v<T, BFloat16> ? 127 : 15;

double value(double x) { return x; }
template <class T>
double half_value(T x) {
  const int mantissa = x.bits & ((1 << kMantissa<T>)-1), exponent = (x.bits & 0x7fff) >> kMantissa<T>;
  const double sign = x.bits & 0x8000 ? -1 : 1;
  if (exponent == 2 * kBias<T> + 1) return mantissa ? NAN : sign * INFINITY;
  const int leading = exponent ? 1 << kMantissa<T> : 0;
  return sign * std::ldexp(leading + mantissa, std::max(exponent, 1) - kBias<T> - kMantissa<T>);
}
double value(BFloat16 x) { return half_value(x); }
double value(Float16 x) { return half_value(x); }

// The nearest T, ties to even.
template <class T>
T rounded(double x) {
  if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(x);
  } else {
    const int sign = std::signbit(x) ? 0x8000 : 0, infinity = (2 * kBias<T> + 1) << kMantissa<T>;
    if (std::isnan(x)) return {static_cast<uint16_t>(sign | infinity | 1 << (kMantissa<T> - 1))};
    if (x == 0 || std::isinf(x)) return {static_cast<uint16_t>(sign | (x == 0 ? 0 : infinity))};
    const int exponent = std::max(std::ilogb(x), 1 - kBias<T>);
    const auto digits = std::nearbyint(std::ldexp(std::fabs(x), kMantissa<T> - exponent));  // may carry
    const double bits = digits + std::ldexp(exponent + kBias<T> - 1, kMantissa<T>);
    return {static_cast<uint16_t>(sign | static_cast<int>(std::min<double>(bits, infinity)))};
  }
}

template <class T>
constexpr double kEpsilon = std::numeric_limits<T>::epsilon();
template <>
constexpr double kEpsilon<BFloat16> = 0x1p-7;
template <>
constexpr double kEpsilon<Float16> = 0x1p-10;

std::mt19937 random_engine(1);

double normal() { return std::normal_distribution<double>()(random_engine); }

int64_t below(int64_t n) { return static_cast<int64_t>(random_engine() % static_cast<uint64_t>(n)); }

// Numbers and what they are in double; exactly as large as they say, so that a sanitizer sees what goes beyond.
template <class T>
struct Numbers {
  std::vector<T> data;

  explicit Numbers(int64_t n, double scale = 1) : data(static_cast<std::size_t>(n)) {
    for (T& x : data) x = rounded<T>(scale * normal());
  }
  T* get() { return data.data(); }
  double operator[](int64_t i) const { return value(data[static_cast<std::size_t>(i)]); }
};

template <class T>
std::string name_of() {
  if (std::is_same_v<T, float>) return "float32";
  if (std::is_same_v<T, double>) return "float64";
  return std::is_same_v<T, BFloat16> ? "bfloat16" : "float16";
}

// A result of sums whose terms have this magnitude: rounded to T once, and as often as there are terms in a chain.
template <class T>
void expect_near(const std::string& what, const char* part, double got, double truth, double magnitude) {
  const double allowed = kEpsilon<T> * std::fabs(truth) + 16 * kEpsilon<ComputeType<T>> * magnitude +
                         (std::is_same_v<T, Float16> ? 0x1p-24 : 0);
  const bool is_nearest = got == value(rounded<T>(truth));
  expect(is_nearest || std::fabs(got - truth) <= allowed, what, part, got, truth);
}

// Calls run(threads) with 1 and 3 of them, from the same start; the results are to be the same bits. (Not with 2 as
// well: a smaller team ends threads, and qemu 7.2 keeps some memory of each.)
template <class T>
void on_threads(const std::string& what, const std::vector<std::vector<T>*>& results,
                const std::function<void(int)>& run) {
  std::vector<std::vector<T>> before, first;
  for (const auto* result : results) before.push_back(*result);
  for (const int threads : {1, 3}) {
    for (std::size_t i = 0; i < results.size(); ++i) *results[i] = before[i];
    run(threads);
    if (threads == 1) {
      for (const auto* result : results) first.push_back(*result);
      continue;
    }
    for (std::size_t i = 0; i < results.size(); ++i) {
      const bool same = std::memcmp(first[i].data(), results[i]->data(), first[i].size() * sizeof(T)) == 0;
      expect(same, what, "the bits of one thread", threads, 1);
    }
  }
}

template <class T>
void run_program(const Program<T>& program, int threads) {
  std::vector<char> workspace(static_cast<std::size_t>(kernels<T>().workspace_bytes(program)) + 64);
  const auto address = (reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64;
  kernels<T>().run(program, reinterpret_cast<void*>(address), {.threads = threads});
}

// ---- products ----

// Rows further apart than they are long, in either order.
template <class T>
struct Matrix {
  int64_t outer, k;
  bool along_k;
  Numbers<T> numbers;

  Matrix(int64_t outer, int64_t k, bool along_k)
      : outer(outer),
        k(k),
        along_k(along_k),
        numbers((along_k ? outer : k) * stride()) {}
  int64_t stride() const { return (along_k ? k : outer) + 3; }
  Operand<T> operand() { return {numbers.get(), along_k ? stride() : 1, along_k ? 1 : stride()}; }
  double at(int64_t i, int64_t j) const { return numbers[along_k ? i * stride() + j : j * stride() + i]; }
};

// What becomes of a product; each in turn, for a number of them that is prime to that of layouts.
enum { plain, bias_and_relu, masked_with_row_sums, masked_result, accumulated, with_row_sums, with_bias, kEnds };

template <class T>
void check_product(int64_t M, int64_t N, int64_t K, bool a_along_k, bool b_along_k, int end) {
  if (end == accumulated && !std::is_same_v<T, ComputeType<T>>) end = plain;
  const bool masked = end == masked_with_row_sums, sums = masked || end == with_row_sums;
  if (sums) a_along_k = false;
  Matrix<T> a(M, K, a_along_k), b(N, K, b_along_k), mask(M, K, a_along_k);
  Numbers<T> bias(N), c(M * N), c_mask(M * N), row_sums(M);
  const std::vector<T> before = c.data;
  Product<T> p = {.M = M, .N = N, .K = K, .a = a.operand(), .b = b.operand(), .c = c.get()};
  if (masked) p.relu_mask = mask.operand();
  if (end == bias_and_relu || end == with_bias) p.bias = bias.get();
  p.relu = end == bias_and_relu;
  p.accumulate = end == accumulated;
  if (end == masked_result) p.c_mask = c_mask.get();
  if (sums) p.row_sums = row_sums.get();

  const std::string what = name_of<T>() + " product " + std::to_string(M) + "x" + std::to_string(N) + "x" +
                           std::to_string(K) + (a_along_k ? " a" : " a^T") + (b_along_k ? " b" : " b^T") + " end " +
                           std::to_string(end);
  const Entry<T> entry = {p};
  on_threads<T>(what, {&c.data, &row_sums.data}, [&](int threads) {
    run_program<T>({&entry, 1, 1}, threads);  // a grain of 1: small ones on threads too
  });
  for (int64_t i = 0; i < M; ++i) {
    double sum = 0, sum_magnitude = 0;
    for (int64_t k = 0; k < K; ++k) {
      const double x = masked && mask.at(i, k) <= 0 ? 0 : a.at(i, k);
      sum += x;
      sum_magnitude += std::fabs(x);
    }
    if (sums) expect_near<T>(what, "row sums", row_sums[i], sum, sum_magnitude);
    for (int64_t j = 0; j < N; ++j) {
      double truth = p.bias ? bias[j] : 0;
      if (p.accumulate) truth += value(before[static_cast<std::size_t>(i * N + j)]);
      double magnitude = std::fabs(truth);
      for (int64_t k = 0; k < K; ++k) {
        const double x = masked && mask.at(i, k) <= 0 ? 0 : a.at(i, k) * b.at(j, k);
        truth += x;
        magnitude += std::fabs(x);
      }
      if ((p.relu && truth < 0) || (p.c_mask && c_mask[i * N + j] <= 0)) truth = 0;
      expect_near<T>(what, "C", c[i * N + j], truth, magnitude);
    }
  }
}

template <class T>
void check_products() {
  int count = 0;
  const auto check = [&](int64_t M, int64_t N, int64_t K) {
    for (const int layout : {0, 1, 2, 3}) check_product<T>(M, N, K, layout & 1, layout & 2, count++ % kEnds);
  };
  for (const int64_t M : {1, 2, 3, 5, 6, 7, 13}) {
    for (const int64_t N : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33}) {
      for (const int64_t K : {1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 33}) check(M, N, K);
    }
  }
  check(0, 3, 5), check(3, 0, 5), check(3, 5, 0);
  for (int i = 0; i < 4; ++i) check(37, 65, 600), check(9, 130, 257), check(70, 21, 1030), check(64, 128, 100);
}

// ---- cross-entropy ----

template <class T>
struct CrossEntropyCase {
  int64_t batch, classes, positions;
  bool probabilities, weighted;
  double smoothing;
  Reduction reduction;
  int index_bytes;
};

template <class T>
void check_cross_entropy(const CrossEntropyCase<T>& one) {
  using A = ComputeType<T>;
  const int64_t n = one.batch * one.positions, classes = one.classes, size = n * classes;
  Numbers<T> logits(size, 3), probabilities(size), weight(classes), grad_output(n), loss(n), loss_alone(n),
      gradient(size), again(size);
  for (T& x : probabilities.data) x = rounded<T>(std::fabs(value(x)));
  for (T& x : weight.data) x = rounded<T>(std::fabs(value(x)));
  constexpr int64_t ignored = 7;
  std::vector<int64_t> target(static_cast<std::size_t>(n));
  std::vector<char> indices(static_cast<std::size_t>(n * one.index_bytes));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t t = below(std::min<int64_t>(classes, 256));
    target[static_cast<std::size_t>(i)] = i % 5 == 4 ? ignored : t == ignored ? 0 : t;
    std::memcpy(&indices[static_cast<std::size_t>(i * one.index_bytes)], &target[static_cast<std::size_t>(i)],
                static_cast<std::size_t>(one.index_bytes));  // little-endian
  }
  const bool none = one.reduction == Reduction::none;
  using Type = ClassIndices::Type;
  const ClassScores<const T> scores = {logits.get(), classes * one.positions, one.positions};
  CrossEntropyForward<T> forward = {
      .problem = {.batch = one.batch,
                  .classes = classes,
                  .positions = one.positions,
                  .logits = scores,
                  .kind = one.probabilities ? TargetKind::probabilities : TargetKind::indices,
                  .target = {indices.data(), one.index_bytes == 8   ? Type::int64
                                             : one.index_bytes == 4 ? Type::int32
                                                                    : Type::uint8},
                  .probabilities = {one.probabilities ? probabilities.get() : nullptr, scores.batch_stride,
                                    scores.class_stride},
                  .weight = one.weighted ? weight.get() : nullptr,
                  .ignore_index = ignored,
                  .label_smoothing = one.smoothing,
                  .reduction = one.reduction},
      .loss = loss.get(),
      .grad_logits = gradient.get(),
      .grad_output = grad_output.get(),
      .grad_output_stride = none ? 1 : 0};
  std::vector<A> max(static_cast<std::size_t>(n)), log_sums(max), total(1);
  forward.position_max = max.data(), forward.position_log_sum = log_sums.data(), forward.total_weight = total.data();
  const CrossEntropyBackward<T> backward = {.problem = forward.problem,
                                            .grad_output = grad_output.get(),
                                            .grad_output_stride = forward.grad_output_stride,
                                            .position_max = max.data(),
                                            .position_log_sum = log_sums.data(),
                                            .total_weight = total.data(),
                                            .grad_logits = again.get(),
                                            .grad_probabilities = nullptr};

  const std::string what =
      name_of<T>() + " cross_entropy " + std::to_string(one.batch) + "x" + std::to_string(classes) + "x" +
      std::to_string(one.positions) + (one.probabilities ? " probabilities" : "") + (one.weighted ? " weighted" : "") +
      (one.smoothing > 0 ? " smoothed" : "") + " reduction " + std::to_string(static_cast<int>(one.reduction));
  on_threads<T>(what, {&loss.data, &loss_alone.data, &gradient.data, &again.data}, [&](int threads) {
    std::vector<A> workspace(static_cast<std::size_t>(kernels<T>().cross_entropy_workspace_bytes(forward)));
    int64_t bad = kernels<T>().cross_entropy_forward(forward, workspace.data(), {.threads = threads});
    expect(bad == -1, what, "bad position", static_cast<double>(bad), -1);
    CrossEntropyForward<T> alone = forward;  // keeps no exponentials
    alone.loss = loss_alone.get(), alone.grad_logits = nullptr;
    bad = kernels<T>().cross_entropy_forward(alone, workspace.data(), {.threads = threads});
    expect(bad == -1, what, "bad position", static_cast<double>(bad), -1);
    bad = kernels<T>().cross_entropy_backward(backward, {.threads = threads});
    expect(bad == -1, what, "bad position", static_cast<double>(bad), -1);
  });

  double divisor = 0, sum = 0, sum_magnitude = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t t = target[static_cast<std::size_t>(i)];
    if (one.probabilities || t != ignored) divisor += one.weighted && !one.probabilities ? weight[t] : 1;
  }
  if (one.reduction != Reduction::mean) divisor = 1;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t t = target[static_cast<std::size_t>(i)];
    const bool counts = one.probabilities || t != ignored;
    const auto at = [&](int64_t c) {
      return i / one.positions * scores.batch_stride + c * scores.class_stride + i % one.positions;
    };
    double largest = -INFINITY, position_loss = 0, magnitude = 0;
    long double exponentials = 0, q_sum = 0;  // a plain chain of a thousand terms rounds more than the kernels do
    for (int64_t c = 0; c < classes; ++c) largest = std::max(largest, logits[at(c)]);
    for (int64_t c = 0; c < classes; ++c) exponentials += std::exp(logits[at(c)] - largest);
    const auto log_sum = static_cast<double>(std::log(exponentials));
    const auto q = [&](int64_t c) {
      const double of_class = one.probabilities ? probabilities[at(c)] : c == t;
      return ((1 - one.smoothing) * of_class + one.smoothing / static_cast<double>(classes)) *
             (one.weighted ? weight[c] : 1);
    };
    for (int64_t c = 0; c < classes && counts; ++c) {
      const double log_p = logits[at(c)] - largest - log_sum;
      position_loss -= q(c) * log_p;
      magnitude += q(c) * (std::fabs(log_p) + log_sum + 1);
      q_sum += q(c);
    }
    sum += position_loss;
    sum_magnitude += magnitude;
    if (none) expect_near<T>(what, "loss", loss[i], position_loss, magnitude);
    if (none) expect_near<T>(what, "loss alone", loss_alone[i], position_loss, magnitude);
    const double scale = grad_output[none ? i : 0] / divisor;
    for (int64_t c = 0; c < classes; ++c) {
      const auto p = static_cast<double>(std::exp(logits[at(c)] - largest) / exponentials);
      const double q_total = static_cast<double>(q_sum);
      const double truth = counts ? scale * (p * q_total - q(c)) : 0;
      const double terms = std::fabs(scale) * (p * q_total * (1 + largest - logits[at(c)]) + q(c));
      expect_near<T>(what, "gradient", gradient[at(c)], truth, terms);
      expect_near<T>(what, "gradient of backward", again[at(c)], truth, terms);
    }
  }
  if (none) return;
  expect_near<T>(what, "loss", loss[0], sum / divisor, sum_magnitude / divisor);
  expect_near<T>(what, "loss alone", loss_alone[0], sum / divisor, sum_magnitude / divisor);
}

template <class T>
void check_cross_entropies() {
  int count = 0;
  for (const int64_t classes : {1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 31, 33, 100, 1003}) {
    for (const int64_t positions : {1, 2, 3, 4, 7, 8, 17}) {
      if (classes > 33 && positions > 3) continue;
      for (int i = 0; i < 6; ++i, ++count) {
        check_cross_entropy<T>({.batch = positions == 1 ? 1 + count % 21 : 1 + count % 3,
                                .classes = classes,
                                .positions = positions,
                                .probabilities = i % 3 == 2,
                                .weighted = count % 2 == 1,
                                .smoothing = count % 5 < 2 ? 0.1 : 0,
                                .reduction = static_cast<Reduction>(count % 3),
                                .index_bytes = count % 4 == 0   ? 1
                                               : count % 4 == 1 ? 4
                                                                : 8});
      }
    }
  }
  int64_t target[] = {0, 1, 5, 7};
  Numbers<T> logits(20), loss(1);
  CrossEntropyForward<T> forward = {.problem = {.batch = 4,
                                                .classes = 5,
                                                .positions = 1,
                                                .logits = {logits.get(), 5, 1},
                                                .kind = TargetKind::indices,
                                                .target = {target, ClassIndices::Type::int64},
                                                .probabilities = {},
                                                .weight = nullptr,
                                                .ignore_index = 7,
                                                .label_smoothing = 0,
                                                .reduction = Reduction::sum},
                                    .loss = loss.get()};
  char workspace[1024];
  const int64_t bad = kernels<T>().cross_entropy_forward(forward, workspace, {});
  expect(bad == 2, name_of<T>() + " cross_entropy", "bad position", static_cast<double>(bad), 2);
}

// ---- SGD, and training steps ----

// As api/sgd.h says, in double.
void update(std::vector<double>& param, const std::vector<double>& grad, std::vector<double>& buffer,
            const SgdOptions& o) {
  for (std::size_t i = 0; i < param.size(); ++i) {
    double g = (o.maximize ? -grad[i] : grad[i]) + o.weight_decay * param[i];
    if (o.momentum != 0) {
      buffer[i] = o.first_step ? g : o.momentum * buffer[i] + (1 - o.dampening) * g;
      g = o.nesterov ? g + o.momentum * buffer[i] : buffer[i];
    }
    param[i] -= o.lr * g;
  }
}

template <class T>
std::vector<double> in_double(const std::vector<T>& numbers) {
  std::vector<double> result;
  for (const T x : numbers) result.push_back(value(x));
  return result;
}

constexpr SgdOptions kOptions[] = {
    {.lr = 0.1,
     .momentum = 0,
     .dampening = 0,
     .weight_decay = 0,
     .nesterov = false,
     .maximize = false,
     .first_step = true},
    {.lr = 0.1,
     .momentum = 0.9,
     .dampening = 0,
     .weight_decay = 0.01,
     .nesterov = true,
     .maximize = false,
     .first_step = false},
    {.lr = 0.1,
     .momentum = 0.9,
     .dampening = 0.5,
     .weight_decay = 0.01,
     .nesterov = false,
     .maximize = true,
     .first_step = false},
    {.lr = 0.1,
     .momentum = 0.9,
     .dampening = 0.5,
     .weight_decay = 0,
     .nesterov = false,
     .maximize = false,
     .first_step = true},
};

template <class T>
void check_sgd() {
  const std::string what = name_of<T>() + " sgd";
  for (const SgdOptions& options : kOptions) {
    for (int64_t size = 0; size < 70; ++size) {
      Numbers<T> param(size), grad(size), buffer(size);
      std::vector<double> truth = in_double(param.data), truth_buffer = in_double(buffer.data);
      const SgdTensor<T> tensor = {size, param.get(), grad.get(), options.momentum != 0 ? buffer.get() : nullptr};
      on_threads<T>(what, {&param.data, &buffer.data},
                    [&](int threads) { kernels<T>().sgd_step(&tensor, 1, options, {.threads = threads}); });
      update(truth, in_double(grad.data), truth_buffer, options);
      const double rounding = 4 * kEpsilon<T> / kEpsilon<ComputeType<T>>;  // each operation is rounded to T
      for (int64_t i = 0; i < size; ++i) {
        const auto at = static_cast<std::size_t>(i);
        expect_near<T>(what, "param", param[i], truth[at], rounding);
        if (options.momentum != 0) expect_near<T>(what, "momentum", buffer[i], truth_buffer[at], rounding);
      }
    }
  }
}

// A multilayer perceptron with ReLU, some steps of it, against the same in double. False, with nothing compared: the
// input of a ReLU was so close to 0 that rounding decides on which side it lies.
template <class T>
bool check_train_steps(const std::vector<int64_t>& sizes, int64_t batch_size, int64_t examples, bool pixels,
                       const SgdOptions& options) {
  const std::string what = name_of<T>() + " train_steps of " + std::to_string(sizes[0]) + " features";
  const int64_t features = sizes[0], classes = sizes.back(), images = examples + 5;
  Numbers<T> values(images * features);
  std::vector<uint8_t> bytes(static_cast<std::size_t>(images * features));
  for (uint8_t& x : bytes) x = static_cast<uint8_t>(below(256));
  std::vector<int64_t> labels, order;
  for (int64_t i = 0; i < images; ++i) labels.push_back(below(classes));
  for (int64_t i = 0; i < examples; ++i) order.push_back(below(images));
  std::vector<Numbers<T>> parameters, buffers;
  TrainSteps<T> steps{};
  for (std::size_t l = 0; l + 1 < sizes.size(); ++l) {
    for (const int64_t size : {sizes[l + 1] * sizes[l], sizes[l + 1]}) {
      parameters.emplace_back(size, 1 / std::sqrt(static_cast<double>(sizes[l])));
      buffers.emplace_back(size, 0);
    }
  }
  for (std::size_t l = 0; l + 1 < sizes.size(); ++l) {
    const auto parameter = [&](std::size_t i) {
      T* buffer = options.momentum != 0 ? buffers[i].get() : nullptr;
      return TrainedParameter<T>{parameters[i].get(), buffer, 0, options.first_step};
    };
    steps.layers.push_back({sizes[l], sizes[l + 1], parameter(2 * l), parameter(2 * l + 1), l + 2 < sizes.size()});
  }
  const T scale = T(1) / 255, shift = T(-0.5);
  steps.source = {.images = {pixels ? nullptr : values.get(), pixels ? bytes.data() : nullptr, features, scale, shift},
                  .target = {labels.data(), ClassIndices::Type::int64},
                  .order = order.data(),
                  .image_count = images,
                  .first = 0};
  steps.examples = examples;
  steps.batch_size = batch_size;
  steps.ignore_index = -100;
  steps.reduction = Reduction::mean;
  steps.groups = {options};
  const std::vector<double> lr(static_cast<std::size_t>(steps.steps()), options.lr);
  Numbers<T> losses(steps.steps());
  steps.lr = lr.data();
  steps.losses = losses.get();

  std::vector<std::vector<double>> truth, truth_buffers;
  for (const auto& p : parameters) truth.push_back(in_double(p.data));
  for (const auto& b : buffers) truth_buffers.push_back(in_double(b.data));
  std::vector<std::vector<T>*> results = {&losses.data};
  for (auto& p : parameters) results.push_back(&p.data);
  for (auto& b : buffers) results.push_back(&b.data);
  on_threads<T>(what, results, [&](int threads) {
    std::vector<char> workspace(static_cast<std::size_t>(kernels<T>().train_steps_workspace_bytes(steps)) + 64);
    const auto address = (reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64;
    const BadExample bad =
        kernels<T>().train_steps(steps, reinterpret_cast<void*>(address), nullptr, {.threads = threads});
    expect(bad.what == BadExample::none, what, "bad example", bad.what, BadExample::none);
  });

  SgdOptions step_options = options;
  for (int64_t step = 0; step < steps.steps(); ++step) {
    std::vector<std::vector<double>> gradients;
    for (const auto& p : truth) gradients.emplace_back(p.size());
    double loss = 0;
    for (int64_t row = 0; row < steps.rows_of(step); ++row) {
      const int64_t example = order[static_cast<std::size_t>(step * batch_size + row)];
      std::vector<std::vector<double>> x(1);
      for (int64_t f = 0; f < features; ++f) {
        const int64_t i = example * features + f;
        x[0].push_back(pixels ? bytes[static_cast<std::size_t>(i)] * double{scale} + double{shift} : values[i]);
      }
      for (std::size_t l = 0; l < steps.layers.size(); ++l) {
        x.emplace_back();
        for (std::size_t o = 0; o < truth[2 * l + 1].size(); ++o) {
          double sum = truth[2 * l + 1][o], magnitude = std::fabs(sum);
          for (std::size_t i = 0; i < x[l].size(); ++i) {
            const double term = truth[2 * l][o * x[l].size() + i] * x[l][i];
            sum += term;
            magnitude += std::fabs(term);
          }
          if (steps.layers[l].relu && std::fabs(sum) < 4 * kEpsilon<T> * magnitude) return false;
          x.back().push_back(steps.layers[l].relu ? std::max(sum, 0.0) : sum);
        }
      }
      const std::vector<double> logits = x.back();
      double exponentials = 0;
      for (const double z : logits) exponentials += std::exp(z);
      const auto label = static_cast<std::size_t>(labels[static_cast<std::size_t>(example)]);
      const auto rows = static_cast<double>(steps.rows_of(step));
      loss += (std::log(exponentials) - logits[label]) / rows;
      std::vector<double> grad;
      for (std::size_t c = 0; c < logits.size(); ++c) {
        grad.push_back((std::exp(logits[c]) / exponentials - (c == label)) / rows);
      }
      for (std::size_t l = steps.layers.size(); l-- > 0;) {
        std::vector<double> grad_input(x[l].size());
        for (std::size_t o = 0; o < grad.size(); ++o) {
          gradients[2 * l + 1][o] += grad[o];
          for (std::size_t i = 0; i < x[l].size(); ++i) {
            gradients[2 * l][o * x[l].size() + i] += grad[o] * x[l][i];
            if (l > 0 && x[l][i] > 0) grad_input[i] += grad[o] * truth[2 * l][o * x[l].size() + i];
          }
        }
        grad = grad_input;
      }
    }
    expect_near<T>(what, "loss", losses[step], loss, 100);
    for (std::size_t i = 0; i < truth.size(); ++i) update(truth[i], gradients[i], truth_buffers[i], step_options);
    step_options.first_step = false;
  }
  for (std::size_t i = 0; i < truth.size(); ++i) {
    for (std::size_t j = 0; j < truth[i].size(); ++j) {
      expect_near<T>(what, "parameter", value(parameters[i].data[j]), truth[i][j], 20);
    }
  }
  return true;
}

template <class T>
void check_training() {
  SgdOptions momentum = kOptions[1];
  momentum.first_step = true;
  const auto check = [](const std::vector<int64_t>& sizes, int64_t batch_size, int64_t examples, bool pixels,
                        const SgdOptions& options) {
    while (!check_train_steps<T>(sizes, batch_size, examples, pixels, options)) {  // with other numbers
    }
  };
  for (const bool pixels : {false, true}) {
    for (const SgdOptions& options : {kOptions[0], momentum}) {
      check({19, 13, 7, 5}, 9, 50, pixels, options);
      check({33, 17, 10}, 300, 300, pixels, options);  // gradients that are not fused
    }
  }
  check({784, 128, 64, 10}, 64, 160, true, momentum);
}

// ---- functions and conversions, of the instruction set that this file is compiled for ----

template <class T>
void check_functions() {
  using V = baseline::Vec<T>;
  const auto check = [](const char* name, V (*function)(V), double (*truth)(double), double from, double to,
                        double ulps) {
    for (int i = 0; i <= 200'000; ++i) {
      const T x = static_cast<T>(from + (to - from) * i / 200'000);
      const double got = function(V::broadcast(x)).raw[i % V::width], expected = truth(static_cast<double>(x));
      const bool tiny = std::fabs(expected) < std::numeric_limits<T>::min();
      expect(std::fabs(got - expected) <= ulps * kEpsilon<T> * std::fabs(expected) || (tiny && got == 0), name_of<T>(),
             name, got, expected);
    }
  };
  const double lowest = sizeof(T) == 4 ? -104 : -746;
  check("exp", [](V x) { return baseline::exp(x); }, std::exp, lowest, 0, 1);
  check("exp", [](V x) { return baseline::exp(x); }, std::exp, -1, 0, 1);
  check("log", [](V x) { return baseline::log(x); }, std::log, 1, 3, 1);
  check("log", [](V x) { return baseline::log(x); }, std::log, 1, 1e30, 1);
  check("tanh", [](V x) { return baseline::tanh(x); }, std::tanh, -10, 10, 4);
}

template <class T>
void check_conversions() {
  using V = baseline::Register<T>;
  const auto same = [](double a, double b) { return a == b ? std::signbit(a) == std::signbit(b) : a != a && b != b; };
  for (int bits = 0; bits < 65536; ++bits) {
    T in[V::width];
    std::fill_n(in, V::width, T{static_cast<uint16_t>(bits)});
    const double truth = value(in[0]), vector = baseline::load(in, V::width).raw[bits % V::width];
    expect(same(vector, truth) && same(baseline::load_one(in), truth), name_of<T>(), "to float32", vector, truth);
  }
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 4099) {  // a prime
    const auto word = static_cast<uint32_t>(bits);
    float x;
    std::memcpy(&x, &word, sizeof(x));
    T one, vector[V::width];
    baseline::store_one(&one, x);
    baseline::store(vector, V::broadcast(x), V::width);
    const double truth = value(rounded<T>(x));
    expect(same(value(one), truth) && same(value(vector[word % V::width]), truth), name_of<T>(), "from float32",
           value(one), truth);
  }
}

template <class T>
void check_all() {
  check_products<T>();
  check_cross_entropies<T>();
  check_sgd<T>();
  if constexpr (std::is_same_v<T, ComputeType<T>>) check_training<T>();
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // so that what failed is seen at once
  for (const std::string& isa : available_isas()) {
    set_isa(isa, "");
    const int64_t before = checks;
    check_all<float>();
    check_all<double>();
    check_all<BFloat16>();
    check_all<Float16>();
    std::printf("%s: %ld checks\n", isa.c_str(), static_cast<long>(checks - before));
    std::fflush(stdout);
  }
  check_functions<float>();
  check_functions<double>();
  check_conversions<BFloat16>();
  check_conversions<Float16>();
  std::printf("%ld passed, %d failed\n", static_cast<long>(checks - failures), failures);
  return failures > 0;
}
