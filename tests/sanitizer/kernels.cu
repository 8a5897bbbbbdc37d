// The CUDA kernels without torch, on small sizes, for compute-sanitizer (memcheck, racecheck, initcheck): `make gpu`
// links this with the object files of the library, and runs it.
//
// Every buffer is exactly as large as its sizes say, so that an access beyond it is one beyond the allocation.
// Whether results are right is for the tests in Python.
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/cuda/step_graph.cuh"

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

DeviceArray<float> numbers(int64_t size) {
  static std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> values(static_cast<size_t>(size));
  for (float& x : values) x = normal(random);
  return DeviceArray<float>(values);
}

// Loss and gradient of a mean over [batch, classes, positions].
void run_cross_entropy(int64_t batch, int64_t classes, int64_t positions) {
  std::vector<int64_t> target(static_cast<size_t>(batch * positions));
  for (size_t i = 0; i < target.size(); ++i) target[i] = static_cast<int64_t>(i) % classes;
  const int64_t size = batch * classes * positions;
  const DeviceArray<float> x = numbers(size), gradient(size), loss(1), one(std::vector<float>{1.0f});
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
}

void run_sgd(int64_t size) {
  const DeviceArray<float> param = numbers(size), grad = numbers(size), buffer = numbers(size);
  const SgdTensor<float> tensor = {size, param.get(), grad.get(), buffer.get()};
  kernels<float>().sgd_step(&tensor, 1, {0.5, 0.5, 0, 0, false, false, false}, {});
  check(cudaDeviceSynchronize(), "sgd_step");
}

// A product of [M, K] and [N, K], each of which may lie the other way round in memory, with bias and ReLU, and with a
// ReLU mask and sums of rows or without.
void run_product(int64_t M, int64_t N, int64_t K, bool a_turned, bool b_turned, bool tf32, bool backward) {
  const DeviceArray<float> a = numbers(M * K), mask = numbers(M * K), b = numbers(N * K), bias = numbers(N);
  const DeviceArray<float> c(M * N), row_sums(M);
  const auto operand = [&](const DeviceArray<float>& data, int64_t outer, bool turned) {
    return turned ? Operand<float>{data.get(), 1, outer} : Operand<float>{data.get(), K, 1};
  };
  const Entry<float> entry = {Product<float>{.M = M,
                                             .N = N,
                                             .K = K,
                                             .a = operand(a, M, a_turned),
                                             .relu_mask = backward ? operand(mask, M, a_turned) : Operand<float>{},
                                             .b = operand(b, N, b_turned),
                                             .bias = bias.get(),
                                             .relu = true,
                                             .allow_tf32 = tf32,
                                             .c = c.get(),
                                             .row_sums = backward ? row_sums.get() : nullptr}};
  const Program<float> program = {&entry, 1, 0};
  const DeviceArray<char> workspace(kernels<float>().workspace_bytes(program));
  kernels<float>().run(program, workspace.get(), {});
  check(cudaDeviceSynchronize(), "product");
}

// Steps of a model with one hidden layer, features - 20 - 5, replayed as a graph; false if there was none.
bool run_train_steps(int64_t features, int64_t batch_size) {
  constexpr int64_t kHidden = 20, kClasses = 5, kImages = 50;
  const DeviceArray<float> weights[] = {numbers(kHidden * features), numbers(kClasses * kHidden)};
  const DeviceArray<float> biases[] = {numbers(kHidden), numbers(kClasses)};
  const DeviceArray<float> buffer = numbers(kClasses);
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
  return (graph.holds != cuda::CapturedStep::Known()) == (kImages / batch_size >= 2);
}

}  // namespace

int main() {
  for (int64_t size : {1, 3, 257, 40'000}) run_sgd(size);
  // Without tensor cores: the small tile whole and split, the large one; single elements and vectors. With them:
  // mma.sync, and wgmma where the device has it.
  const int64_t products[][3] = {{64, 10, 64}, {64, 128, 784}, {33, 35, 37}, {900, 840, 128}, {200, 136, 1096}};
  for (const auto& p : products) {
    for (int i = 0; i < 16; ++i) run_product(p[0], p[1], p[2], i & 1, i & 2, i & 4, i & 8);
  }
  bool right = true;
  for (const int64_t features : {13, 16, 784}) {
    for (const int64_t batch_size : {7, 32}) right = run_train_steps(features, batch_size) && right;
  }
  const int64_t shapes[][3] = {{1, 1, 1}, {64, 10, 1}, {5000, 32, 1}, {300, 257, 1}, {40, 5003, 1}, {3, 11, 1000}};
  for (const auto& shape : shapes) run_cross_entropy(shape[0], shape[1], shape[2]);
  std::puts(right ? "all kernels ran" : "steps were not captured as they should be");
  return right ? 0 : 1;
}
