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

#include "../../csrc/kernels/cuda/cross_entropy_launch.cuh"
#include "../../csrc/kernels/cuda/graph.cu"
#include "../../csrc/kernels/cuda/linear_launch.cuh"
#include "../../csrc/kernels/cuda/linear_mma_launch.cuh"
#include "../../csrc/kernels/cuda/linear_wgmma_launch.cuh"
#include "../../csrc/kernels/cuda/sgd.cuh"
#include "../../csrc/kernels/cuda/train_step_sequence.cu"

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

  const DeviceArray<float> x(logits), gradient(size), loss(1), grad_output(std::vector<float>{0.5f});
  const DeviceArray<int64_t> t(target);
  const DeviceArray<char> workspace(cuda::cross_entropy_workspace_bytes(batch, classes, positions));
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
                                              .position_loss = nullptr,
                                              .position_max = nullptr,
                                              .position_log_sum = nullptr,
                                              .total_weight = nullptr,
                                              .grad_logits = gradient.get(),
                                              .loss = loss.get()};
  cuda::cross_entropy_forward<float>(forward, nullptr, false, nullptr, workspace.get(), nullptr);
  cuda::cross_entropy_forward<float>(forward, grad_output.get(), true, nullptr, workspace.get(), nullptr);
  check(cudaDeviceSynchronize(), "cross_entropy");
  const double ours = static_cast<double>(loss.host(1)[0]);
  double sum = 0;
  for (float g : gradient.host(size)) sum += static_cast<double>(g);
  const bool right = std::abs(ours - truth) < 1e-5 * truth && std::abs(sum) < 1e-4;
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
    cuda::sgd_step<float>(&tensor, 1, {0.5, 0.5, 0, 0, false, false, false}, nullptr, nullptr);
    check(cudaDeviceSynchronize(), "sgd_step");
    for (float p : param.host(size)) right = right && p == 0.25f;
  }
  std::printf("sgd_step%s\n", right ? "" : "  WRONG");
  return right;
}

// A product of [rows, depth] and [columns, depth], each of which may lie the other way round in memory, with bias,
// ReLU, gate and sums of rows.
bool run_linear(int64_t rows, int64_t columns, int64_t depth, bool a_turned, bool b_turned, cuda::Precision precision) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 1);
  const auto numbers = [&](int64_t size) {
    std::vector<float> values(static_cast<size_t>(size));
    for (float& x : values) x = normal(random);
    return values;
  };
  const std::vector<float> a = numbers(rows * depth), gate = numbers(rows * depth), b = numbers(columns * depth);
  const std::vector<float> bias = numbers(columns);
  const DeviceArray<float> da(a), dgate(gate), db(b), dbias(bias), out(rows * columns), row_sums(rows);
  const auto operand = [&](const DeviceArray<float>& data, int64_t outer, bool turned) {
    return turned ? cuda::Operand<float>{data.get(), 1, outer} : cuda::Operand<float>{data.get(), depth, 1};
  };
  const cuda::Product<float> product = {.rows = rows,
                                        .columns = columns,
                                        .depth = depth,
                                        .a = operand(da, rows, a_turned),
                                        .gate = operand(dgate, rows, a_turned),
                                        .b = operand(db, columns, b_turned),
                                        .bias = dbias.get(),
                                        .relu = true,
                                        .out = out.get(),
                                        .row_sums = row_sums.get()};
  const DeviceArray<char> workspace(cuda::product_workspace_bytes(product, precision));
  cuda::product(product, precision, workspace.get(), nullptr);
  check(cudaDeviceSynchronize(), "linear");
  const std::vector<float> ours = out.host(rows * columns), sums = row_sums.host(rows);
  double error = 0;
  for (int64_t r = 0; r < rows; ++r) {
    double sum_of_row = 0;
    for (int64_t c = 0; c < columns; ++c) {
      double sum = bias[c];
      for (int64_t k = 0; k < depth; ++k) {
        const int64_t i = a_turned ? k * rows + r : r * depth + k;
        const double x = gate[i] <= 0 ? 0 : a[i];
        sum += x * b[b_turned ? k * columns + c : c * depth + k];
        if (c == 0) sum_of_row += x;
      }
      error = std::max(error, std::abs(ours[r * columns + c] - std::max(sum, 0.0)));
    }
    error = std::max(error, std::abs(sums[r] - sum_of_row));
  }
  const bool tf32 = precision == cuda::Precision::tf32;
  const bool right = error < (tf32 ? 1e-3 : 1e-5) * static_cast<double>(depth);
  std::printf("linear%s %lld x %lld x %lld, %d %d: error %.1e%s\n", tf32 ? " tf32" : "", static_cast<long long>(rows),
              static_cast<long long>(columns), static_cast<long long>(depth), a_turned, b_turned, error,
              right ? "" : "  WRONG");
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
  const TrainedLayer<float> layers[] = {{features,
                                         kHidden,
                                         {weights[0].get(), nullptr, 0, false},
                                         {biases[0].get(), nullptr, 0, false},
                                         Activation::relu},
                                        {kHidden,
                                         kClasses,
                                         {weights[1].get(), nullptr, 0, false},
                                         {biases[1].get(), buffer.get(), 1, true},
                                         Activation::none}};
  const DeviceArray<uint8_t> pixels(std::vector<uint8_t>(static_cast<size_t>(kImages * features), 100));
  const DeviceArray<int64_t> labels(std::vector<int64_t>(kImages, 3));
  const SgdOptions groups[] = {{0, 0, 0, 0.1, false, false, false}, {0, 0.9, 0, 0, true, false, false}};
  TrainSteps<float> x = {.layers = layers,
                         .depth = 2,
                         .images = {nullptr, pixels.get(), features, 0.01f, -0.5f},
                         .target = {labels.get(), ClassIndices::Type::int64},
                         .order = nullptr,
                         .examples = kImages,
                         .batch_size = batch_size,
                         .class_weight = nullptr,
                         .ignore_index = -100,
                         .label_smoothing = 0,
                         .reduction = Reduction::mean,
                         .groups = groups,
                         .group_count = 2,
                         .lr = nullptr,
                         .losses = nullptr};
  const std::vector<double> rates(static_cast<size_t>(x.steps() * 2), 0.1);
  const DeviceArray<float> losses(x.steps());
  x.lr = rates.data();
  x.losses = losses.get();
  const DeviceArray<char> workspace(cuda::train_steps_sequence_workspace_bytes(x));
  cuda::StepGraph graph;
  cuda::train_steps_in_sequence(x, kImages, workspace.get(), &graph, nullptr);
  check(cudaDeviceSynchronize(), "train_steps");
  bool right = graph.holds.empty() == (kImages / batch_size < 2);  // what is made once is not captured
  const std::vector<float> found = losses.host(x.steps());
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
      right = run_linear(p[0], p[1], p[2], layout & 1, layout & 2, cuda::Precision::full) && right;
    }
  }
  // On tensor cores: mma.sync; wgmma where the device has it, with b across the depth for many rows only.
  const int64_t tf32_products[][3] = {{33, 35, 37}, {200, 136, 1096}, {2048, 128, 128}};
  for (const auto& p : tf32_products) {
    for (int layout = 0; layout < 4; ++layout) {
      right = run_linear(p[0], p[1], p[2], layout & 1, layout & 2, cuda::Precision::tf32) && right;
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
