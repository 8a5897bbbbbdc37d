// The two matrix products of the linear layer's forward against each other: dot products (dot_gemm.h) and packed outer
// products (gemm.h). Built and run by products.py; the choice between them is in csrc/cpu/product/plan.h.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../csrc/cpu/product/plan.h"

using namespace mnist_ext;
using namespace mnist_ext::MNIST_EXT_ISA;

namespace {

// Random numbers, aligned as PyTorch's tensors are.
struct Floats {
  int64_t size;
  float* data;

  explicit Floats(int64_t n) : size(n), data(static_cast<float*>(std::aligned_alloc(64, (n * 4 + 63) / 64 * 64))) {
    for (int64_t i = 0; i < n; ++i) data[i] = static_cast<float>(std::rand()) / RAND_MAX - 0.5f;
  }
  ~Floats() { std::free(data); }
  Floats(const Floats&) = delete;
};

template <class Body>
double microseconds(const Body& body, int calls) {
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) body();
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count() / calls;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void compare(int64_t M, int64_t N, int64_t K, int threads) {
  const Floats a(M * K), b(N * K), bias(N), by_dot(M * N), by_outer(M * N);
  const auto product = [&](float* c) {
    return Block<float>::whole(
        {.M = M, .N = N, .K = K, .a = {a.data, K, 1}, .b = {b.data, K, 1}, .bias = bias.data, .relu = true, .c = c});
  };
  const auto run = [&](const Block<float>& block, bool dots) {
    parallel(threads, [&](int thread, int count) { product_share(block, dots, thread, count); });
  };
  const auto dot = [&] { run(product(by_dot.data), true); };
  const auto outer = [&] { run(product(by_outer.data), false); };
  dot();
  outer();
  for (int64_t i = 0; i < by_dot.size; ++i) {
    if (std::abs(by_dot.data[i] - by_outer.data[i]) > 1e-3f) {
      std::printf("the products differ\n");
      std::exit(1);
    }
  }
  const int calls = std::max(1, static_cast<int>(20e3 / microseconds(outer, 3)));
  std::vector<double> times[2], ratios;
  for (int turn = 0; turn < 11; ++turn) {
    times[0].push_back(microseconds(dot, calls));
    times[1].push_back(microseconds(outer, calls));
    ratios.push_back(times[1].back() / times[0].back());
  }
  const bool chosen = use_dot_products<float>(M, N, K);
  std::printf("%5ld x %4ld x %4ld  %10.1f  %10.1f  %5.2f  %s\n", static_cast<long>(M), static_cast<long>(K),
              static_cast<long>(N), median(times[0]), median(times[1]), median(ratios), chosen ? "dot" : "outer");
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  std::printf("%-19s  %10s  %10s  %5s  %s\n", "M x K x N", "dot us", "outer us", "ratio", "chosen");
  for (const int64_t M : {8, 64, 128, 256, 1024, 4096}) {
    for (const auto& [K, N] : {std::pair<int64_t, int64_t>{784, 128},
                               {128, 64},
                               {64, 10},
                               {256, 256},
                               {512, 512},
                               {1024, 1024},
                               {789, 333},
                               {4096, 1024}}) {
      compare(M, N, K, threads);
    }
  }
}
