// The products of a linear layer by each of our kernels, against sgemm of the library that PyTorch uses. Built and run
// by products.py; the choice between the kernels is in csrc/cpu/product/plan.h.
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "../csrc/api/program.h"
#include "../csrc/cpu/product/plan.h"

using namespace mnist_ext;
using namespace mnist_ext::MNIST_EXT_ISA;

namespace {

using Sgemm = void (*)(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                       const int*, const float*, const int*, const float*, float*, const int*);

// Random numbers, aligned as PyTorch's tensors are.
struct Numbers {
  int64_t size;
  float* data;

  explicit Numbers(int64_t n) : size(n), data(static_cast<float*>(std::aligned_alloc(64, (n * 4 + 63) / 64 * 64))) {
    for (int64_t i = 0; i < n; ++i) data[i] = static_cast<float>(std::rand()) / RAND_MAX - 0.5f;
  }
  ~Numbers() { std::free(data); }
  Numbers(const Numbers&) = delete;
};

double microseconds(const std::function<void()>& body, int calls) {
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) body();
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count() / calls;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void check(const Numbers& ours, const Numbers& expected, int64_t size, const std::string& kernel) {
  for (int64_t i = 0; i < size; ++i) {
    if (!(std::abs(ours.data[i] - expected.data[i]) < 2e-3f)) {
      std::printf("%s differs from sgemm\n", kernel.c_str());
      std::exit(1);
    }
  }
}

void compare(const char* what, const Product<float>& product, const std::function<void(float*)>& sgemm, int threads,
             int turns) {
  const Block<float> block(product);
  const Numbers expected(product.M * product.N), c(product.M * product.N);
  std::map<std::string, std::function<void()>> kernels;
  const auto add = [&](const std::string& name, Kernel kernel) {
    kernels[name] = [&, kernel] {
      Block<float> g = block;
      g.c = c.data;
      const int worth = threads_for(multiply_adds(product), kProductGrain, threads);
      parallel(worth, [&](int thread, int count) { product_share(g, kernel, thread, count); });
    };
  };
  add("outer", Kernel::outer_products);
  if (product.b.k_stride == 1) add("dot", Kernel::dot_products);
  if (kHasAmx) add("amx", Kernel::amx);
  const auto baseline = [&] { sgemm(expected.data); };
  baseline();
  for (const auto& [name, run] : kernels) {
    run();
    check(c, expected, product.M * product.N, name);
  }

  const int calls = std::max(1, static_cast<int>(10e3 / microseconds(baseline, 3)));
  std::vector<double> times;
  std::map<std::string, std::vector<double>> ratios;
  for (int turn = 0; turn < turns; ++turn) {
    times.push_back(microseconds(baseline, calls));
    for (const auto& [name, run] : kernels) ratios[name].push_back(times.back() / microseconds(run, calls));
  }
  const double flops =
      2 * static_cast<double>(product.M) * static_cast<double>(product.N) * static_cast<double>(product.K);
  std::printf("%-11s %5ld x %5ld x %5ld %10.1f %8.0f", what, static_cast<long>(product.M), static_cast<long>(product.N),
              static_cast<long>(product.K), median(times), flops / median(times) / 1e3);
  for (const char* name : {"outer", "dot", "amx"}) {
    ratios.contains(name) ? std::printf("  %5.2f", median(ratios[name])) : std::printf("  %5s", "-");
  }
  const Kernel chosen = kernel_of(block);
  std::printf("  %s\n", chosen == Kernel::amx ? "amx" : chosen == Kernel::dot_products ? "dot" : "outer");
  std::fflush(stdout);
}

// The three products of a layer, row-major: batch by in by out.
void compare_layer(Sgemm sgemm, int batch, int in, int out, int threads, int turns) {
  const Numbers x(int64_t{batch} * in), w(int64_t{out} * in), dy(int64_t{batch} * out);
  const float one = 1, zero = 0;
  compare(
      "forward", {.M = batch, .N = out, .K = in, .a = {x.data, in, 1}, .b = {w.data, in, 1}},
      [&](float* c) { sgemm("T", "N", &out, &batch, &in, &one, w.data, &in, x.data, &in, &zero, c, &out); }, threads,
      turns);
  compare(
      "grad_input", {.M = batch, .N = in, .K = out, .a = {dy.data, out, 1}, .b = {w.data, 1, in}},
      [&](float* c) { sgemm("N", "N", &in, &batch, &out, &one, w.data, &in, dy.data, &out, &zero, c, &in); }, threads,
      turns);
  compare(
      "grad_weight", {.M = out, .N = in, .K = batch, .a = {dy.data, 1, out}, .b = {x.data, 1, in}},
      [&](float* c) { sgemm("N", "T", &in, &out, &batch, &one, x.data, &in, dy.data, &out, &zero, c, &in); }, threads,
      turns);
}

}  // namespace

// LIBRARY THREADS TURNS (BATCH IN OUT)...
int main(int count, char** arguments) {
  void* library = dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL);
  if (!library) return std::printf("%s\n", dlerror()), 1;
  const auto sgemm = reinterpret_cast<Sgemm>(dlsym(library, "sgemm_"));
  if (!sgemm) return std::printf("%s has no sgemm_\n", arguments[1]), 1;
  constexpr long request_permission = 0x1023, tile_data = 18;
  if (kHasAmx && syscall(SYS_arch_prctl, request_permission, tile_data) != 0) {
    return std::printf("the system gives no permission to use AMX\n"), 1;
  }
  const int threads = std::atoi(arguments[2]), turns = std::atoi(arguments[3]);
  omp_set_num_threads(threads);
  std::printf("%-11s %-21s %10s %8s  %5s  %5s  %5s  chosen\n", "product", "    M x     N x     K", "sgemm us",
              "GFLOP/s", "outer", "dot", "amx");
  for (int i = 4; i + 2 < count; i += 3) {
    compare_layer(sgemm, std::atoi(arguments[i]), std::atoi(arguments[i + 1]), std::atoi(arguments[i + 2]), threads,
                  turns);
  }
}
