// The CUDA kernels without torch, on small sizes, for compute-sanitizer: `make gpu` builds and runs this.
//
//   nvcc -std=c++20 -arch=native -lineinfo tests/sanitizer/kernels.cu -o kernels
//   compute-sanitizer --tool memcheck ./kernels     (and racecheck, initcheck)
//
// Every buffer is exactly as large as the kernels are told, so that an access beyond it is one beyond the allocation.
// The losses are compared with a plain loop in double.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/cuda/instantiate/float32.cu"
#include "../../csrc/cuda/instantiate/float64.cu"
#include "../../csrc/cuda/instantiate/half.cu"
#include "../../csrc/cuda/instantiate/tensor_cores_bfloat16.cu"
#include "../../csrc/cuda/instantiate/tensor_cores_float16.cu"
#include "../../csrc/cuda/instantiate/tensor_cores_tf32.cu"
#include "../../csrc/cuda/table.cu"

using namespace mnist_ext;
using mnist_ext::cuda::check;

namespace {

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t size) {
    check(cudaMalloc(&data_, static_cast<size_t>(size > 0 ? size : 1) * sizeof(T)), "cudaMalloc");
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(static_cast<int64_t>(host.size())) {
    check(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* get() const { return static_cast<T*>(data_); }
  std::vector<T> host(int64_t size) const {
    std::vector<T> values(static_cast<size_t>(size));
    check(cudaMemcpy(values.data(), data_, values.size() * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }

 private:
  void* data_ = nullptr;
};

// Loss and gradient of a mean over [batch, classes, positions]; false if the loss is wrong.
bool run(int64_t batch, int64_t classes, int64_t positions) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 2);
  const int64_t count = batch * positions, size = count * classes;
  std::vector<float> logits(static_cast<size_t>(size));
  std::vector<int64_t> target(static_cast<size_t>(count));
  for (float& x : logits) x = normal(random);
  for (int64_t& t : target) t = static_cast<int64_t>(random() % static_cast<unsigned>(classes));

  double truth = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = i / positions * classes * positions + i % positions;
    double sum = 0;
    for (int64_t c = 0; c < classes; ++c) sum += std::exp(static_cast<double>(logits[first + c * positions]));
    truth += std::log(sum) - static_cast<double>(logits[first + target[i] * positions]);
  }
  truth /= static_cast<double>(count);

  const DeviceArray<float> x(logits), gradient(size), loss(1), one(std::vector<float>{1.0f});
  const DeviceArray<int64_t> t(target);
  const CrossEntropyForward<float> forward = {.problem = {.batch = batch,
                                                          .classes = classes,
                                                          .positions = positions,
                                                          .logits = {x.get(), classes * positions, positions},
                                                          .kind = TargetKind::indices,
                                                          .target = {t.get(), ClassIndices::Type::int64},
                                                          .probabilities = {},
                                                          .weight = nullptr,
                                                          .ignore_index = -100,
                                                          .label_smoothing = 0,
                                                          .reduction = Reduction::mean},
                                              .loss = loss.get(),
                                              .grad_logits = gradient.get()};
  CrossEntropyForward<float> again = forward;
  again.grad_output = one.get();
  again.unless_one = true;
  const Kernels<float>& table = kernels<float>();
  const DeviceArray<char> workspace(table.cross_entropy_workspace_bytes(forward));
  table.cross_entropy_forward(forward, workspace.get(), {});
  table.cross_entropy_forward(again, workspace.get(), {});
  check(cudaDeviceSynchronize(), "cross_entropy");
  const double ours = static_cast<double>(loss.host(1)[0]);
  double sum = 0;
  for (float g : gradient.host(size)) sum += static_cast<double>(g);
  const bool right = std::abs(ours - truth) <= 1e-5 * truth && std::abs(sum) < 1e-4;
  std::printf("cross_entropy %lld x %lld x %lld: loss %.7f, expected %.7f, sum of the gradient %.1e%s\n",
              static_cast<long long>(batch), static_cast<long long>(classes), static_cast<long long>(positions), ours,
              truth, sum, right ? "" : "  WRONG");
  return right;
}

bool run_sgd() {
  bool right = true;
  for (int64_t size : {1, 3, 257, 40'000}) {
    const std::vector<float> ones(static_cast<size_t>(size), 1.0f);
    const DeviceArray<float> param(ones), grad(ones), buffer(ones);
    const SgdTensor<float> tensor = {size, param.get(), grad.get(), buffer.get()};
    kernels<float>().sgd_step(&tensor, 1, {0.5, 0.5, 0, 0, false, false, false}, {});
    check(cudaDeviceSynchronize(), "sgd_step");
    for (float p : param.host(size)) right = right && p == 0.25f;
  }
  std::printf("sgd_step%s\n", right ? "" : "  WRONG");
  return right;
}

// A product of [M, K] and [N, K], each of which may lie the other way round in memory, with bias, ReLU, ReLU mask and
// sums of rows.
bool run_product(int64_t M, int64_t N, int64_t K, bool a_turned, bool b_turned, bool tf32) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 1);
  const auto numbers = [&](int64_t size) {
    std::vector<float> values(static_cast<size_t>(size));
    for (float& x : values) x = normal(random);
    return values;
  };
  const std::vector<float> a = numbers(M * K), mask = numbers(M * K), b = numbers(N * K), bias = numbers(N);
  const DeviceArray<float> da(a), dmask(mask), db(b), dbias(bias), c(M * N), row_sums(M);
  const auto operand = [&](const DeviceArray<float>& data, int64_t outer, bool turned) {
    return turned ? Operand<float>{data.get(), 1, outer} : Operand<float>{data.get(), K, 1};
  };
  const Entry<float> entry = {Product<float>{.M = M,
                                             .N = N,
                                             .K = K,
                                             .a = operand(da, M, a_turned),
                                             .relu_mask = operand(dmask, M, a_turned),
                                             .b = operand(db, N, b_turned),
                                             .bias = dbias.get(),
                                             .relu = true,
                                             .allow_tf32 = tf32,
                                             .c = c.get(),
                                             .row_sums = row_sums.get()}};
  const Program<float> program = {&entry, 1, 0};
  const DeviceArray<char> workspace(kernels<float>().workspace_bytes(program));
  kernels<float>().run(program, workspace.get(), {});
  check(cudaDeviceSynchronize(), "product");
  const std::vector<float> ours = c.host(M * N), sums = row_sums.host(M);
  double error = 0;
  for (int64_t m = 0; m < M; ++m) {
    double sum_of_row = 0;
    for (int64_t n = 0; n < N; ++n) {
      double sum = bias[n];
      for (int64_t k = 0; k < K; ++k) {
        const int64_t i = a_turned ? k * M + m : m * K + k;
        const double x = mask[i] <= 0 ? 0 : a[i];
        sum += x * b[b_turned ? k * N + n : n * K + k];
        if (n == 0) sum_of_row += x;
      }
      error = std::max(error, std::abs(ours[m * N + n] - std::max(sum, 0.0)));
    }
    error = std::max(error, std::abs(sums[m] - sum_of_row));
  }
  const bool right = error < (tf32 ? 1e-3 : 1e-5) * static_cast<double>(K);
  std::printf("product%s %lld x %lld x %lld, %d %d: error %.1e%s\n", tf32 ? " tf32" : "", static_cast<long long>(M),
              static_cast<long long>(N), static_cast<long long>(K), a_turned, b_turned, error, right ? "" : "  WRONG");
  return right;
}

// Steps of a model with one hidden layer, features - 20 - 5, replayed as a graph. Its weights are 0 at first, so that
// the first loss is log(5); all labels are the same, so that the following ones are smaller.
bool run_train_steps(int64_t features, int64_t batch_size) {
  constexpr int64_t kHidden = 20, kClasses = 5, kImages = 50;
  const auto zeros = [](int64_t n) { return std::vector<float>(static_cast<size_t>(n)); };
  const DeviceArray<float> weights[] = {DeviceArray<float>(zeros(kHidden * features)),
                                        DeviceArray<float>(zeros(kClasses * kHidden))};
  const DeviceArray<float> biases[] = {DeviceArray<float>(zeros(kHidden)), DeviceArray<float>(zeros(kClasses))};
  const DeviceArray<float> buffer(zeros(kClasses));
  const std::vector<TrainedLayer<float>> layers = {{.in_features = features,
                                                    .out_features = kHidden,
                                                    .weight = {weights[0].get(), nullptr, 0, false},
                                                    .bias = {biases[0].get(), nullptr, 0, false},
                                                    .relu = true},
                                                   {.in_features = kHidden,
                                                    .out_features = kClasses,
                                                    .weight = {weights[1].get(), nullptr, 0, false},
                                                    .bias = {biases[1].get(), buffer.get(), 1, true},
                                                    .relu = false}};
  const DeviceArray<uint8_t> pixels(std::vector<uint8_t>(static_cast<size_t>(kImages * features), 100));
  const DeviceArray<int64_t> labels(std::vector<int64_t>(kImages, 3));
  TrainSteps<float> steps = {.layers = layers,
                             .source = {.images = {nullptr, pixels.get(), features, 0.01f, -0.5f},
                                        .target = {labels.get(), ClassIndices::Type::int64},
                                        .order = nullptr,
                                        .image_count = kImages,
                                        .first = 0},
                             .examples = kImages,
                             .batch_size = batch_size,
                             .class_weight = nullptr,
                             .ignore_index = -100,
                             .label_smoothing = 0,
                             .reduction = Reduction::mean,
                             .groups = {{0, 0, 0, 0.1, false, false, false}, {0, 0.9, 0, 0, true, false, false}},
                             .lr = nullptr,
                             .losses = nullptr};
  const std::vector<double> rates(static_cast<size_t>(steps.steps() * 2), 0.1);
  const DeviceArray<float> losses(steps.steps());
  steps.lr = rates.data();
  steps.losses = losses.get();
  const DeviceArray<char> workspace(kernels<float>().train_steps_workspace_bytes(steps));
  cuda::CapturedStep graph;
  kernels<float>().train_steps(steps, workspace.get(), &graph, {});
  check(cudaDeviceSynchronize(), "train_steps");
  // What is made once is not captured.
  const bool captured = graph.holds != cuda::CapturedStep::Known();
  bool right = captured == (kImages / batch_size >= 2);
  const std::vector<float> found = losses.host(steps.steps());
  right = right && std::abs(found[0] - std::log(5.0f)) < 1e-6f;
  for (size_t i = 1; i < found.size(); ++i) right = right && found[i] < found[i - 1];
  std::printf("train_steps, %lld features, batches of %lld: losses from %.6f to %.6f%s\n",
              static_cast<long long>(features), static_cast<long long>(batch_size), static_cast<double>(found[0]),
              static_cast<double>(found.back()), right ? "" : "  WRONG");
  return right;
}

}  // namespace

int main() {
  bool right = run_sgd();
  // The small tile whole and split, the medium one, the large one; single elements and vectors.
  const int64_t products[][3] = {{64, 10, 64}, {64, 128, 784}, {33, 35, 37}, {900, 840, 128}, {1500, 1480, 64}};
  for (const auto& p : products) {
    for (int layout = 0; layout < 4; ++layout) {
      right = run_product(p[0], p[1], p[2], layout & 1, layout & 2, false) && right;
    }
  }
  // On tensor cores: mma.sync; wgmma where the device has it, with b across the depth for many rows only.
  const int64_t tf32_products[][3] = {{33, 35, 37}, {200, 136, 1096}, {2048, 128, 128}};
  for (const auto& p : tf32_products) {
    for (int layout = 0; layout < 4; ++layout) {
      right = run_product(p[0], p[1], p[2], layout & 1, layout & 2, true) && right;
    }
  }
  for (const int64_t features : {13, 16, 784}) {
    for (const int64_t batch_size : {7, 32}) right = run_train_steps(features, batch_size) && right;
  }
  const int64_t shapes[][3] = {{1, 1, 1},     {64, 10, 1},    {700, 10, 1},    {5000, 32, 1}, {300, 257, 1},
                               {40, 5003, 1}, {3, 33'001, 1}, {2, 140'001, 1}, {3, 11, 1000}};
  for (const auto& shape : shapes) right = run(shape[0], shape[1], shape[2]) && right;
  return right ? 0 : 1;
}
