// One step of SGD with momentum over the 109,386 parameters of 784-128-64-10, six tensors: from a pass per operation to
// cpu/sgd.h. Nothing but bytes: three multiply-adds for each 20 of them.
//
//   pass_per_op        one pass for each of the three operations, which the compiler makes vectors of
//   one_pass           all three while an element is in a register
//   vec                the same, in vectors by hand
//   threads            each tensor divided among the threads
//   sgd_step           the kernel in use: all tensors divided as if they were one
//
//   python benchmarks/ladder/ladder.py sgd
#include "../../csrc/cpu/sgd.h"

#include "ladder.h"

namespace {

using namespace ladder;
using Tensor = SgdTensor<float>;
using Tensors = std::vector<Tensor>;

constexpr float kLr = 0.01f, kMomentum = 0.9f;

void pass_per_op(const Tensors& tensors) {
  for (const Tensor& t : tensors) {
    for (int64_t i = 0; i < t.size; ++i) t.momentum_buffer[i] *= kMomentum;
    for (int64_t i = 0; i < t.size; ++i) t.momentum_buffer[i] += t.grad[i];
    for (int64_t i = 0; i < t.size; ++i) t.param[i] -= kLr * t.momentum_buffer[i];
  }
}

void one_pass(const Tensors& tensors) {
  for (const Tensor& t : tensors) {
    for (int64_t i = 0; i < t.size; ++i) {
      const float b = kMomentum * t.momentum_buffer[i] + t.grad[i];
      t.momentum_buffer[i] = b;
      t.param[i] -= kLr * b;
    }
  }
}

void vec(const Tensor& t, Range range) {
  using V = Vec<float>;
  const V momentum = V::broadcast(kMomentum), minus_lr = V::broadcast(-kLr);
  for_each_vector<float>(range.size(), [&](int64_t j, int lanes) __attribute__((always_inline)) {
    const int64_t i = range.begin + j;
    const V b = fma(momentum, load(t.momentum_buffer + i, lanes), load(t.grad + i, lanes));
    store(t.momentum_buffer + i, b, lanes);
    store(t.param + i, fma(minus_lr, b, load(t.param + i, lanes)), lanes);
  });
}

// A parallel region costs some microseconds, so that small tensors stay with one thread.
void threads(const Tensors& tensors, int threads) {
  for (const Tensor& t : tensors) {
    parallel(threads_for(static_cast<double>(t.size), kSgdGrain, threads),
             [&](int thread, int count) { vec(t, split(t.size, Vec<float>::width, thread, count)); });
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  const int64_t sizes[] = {784 * 128, 128, 128 * 64, 64, 64 * 10, 10};
  int64_t total = 0;
  for (const int64_t size : sizes) total += size;
  const Buffer start(total), start_momentum(total), grad(total);
  Buffer param(total), momentum(total);
  Tensors tensors;
  int64_t offset = 0;
  for (const int64_t size : sizes) {
    tensors.push_back({size, param.data + offset, grad.data + offset, momentum.data + offset});
    offset += size;
  }
  const int n = options.threads;

  std::vector<double> param_truth, momentum_truth;
  for (int64_t i = 0; i < total; ++i) {
    momentum_truth.push_back(double{kMomentum} * start_momentum.data[i] + grad.data[i]);
    param_truth.push_back(start.data[i] - double{kLr} * momentum_truth.back());
  }

  Ladder ladder("SGD with momentum, 109,386 parameters", "GB/s", 5.0 * 4 * total);  // three reads, two writes
  ladder.expect(param, std::move(param_truth));
  ladder.expect(momentum, std::move(momentum_truth));
  ladder.start_from([&] {
    std::copy_n(start.data, total, param.data);
    std::copy_n(start_momentum.data, total, momentum.data);
  });
  ladder.copy_limit(1, 3 * 4 * total);
  if (n > 1) ladder.copy_limit(n, 3 * 4 * total);
  ladder.rung("pass_per_op", 1, [&] { pass_per_op(tensors); });
  ladder.rung("one_pass", 1, [&] { one_pass(tensors); });
  ladder.rung("vec", 1, [&] {
    for (const Tensor& t : tensors) vec(t, {0, t.size});
  });
  if (n > 1) ladder.rung("threads", n, [&] { threads(tensors, n); });
  const SgdOptions of_step = {.lr = kLr,
                              .momentum = kMomentum,
                              .dampening = 0,
                              .weight_decay = 0,
                              .nesterov = false,
                              .maximize = false,
                              .first_step = false};
  ladder.rung("sgd_step", n, [&] {
    MNIST_EXT_ISA::sgd_step<float>(tensors.data(), static_cast<int64_t>(tensors.size()), of_step, {.threads = n});
  });
  ladder.run(options);
}
