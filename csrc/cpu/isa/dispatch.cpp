// The kernels' public entry points: pick the instruction set once, then call through its table.
#include <cstdlib>
#include <stdexcept>

#include "isa.h"
#include "kernel_table.h"

namespace mnist_ext {
namespace {

struct Isa {
  const char* name;
  const KernelTable* kernels;
};

std::vector<Isa> detect() {
  std::vector<Isa> isas = {{"baseline", &kernels_baseline}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    isas.push_back({"avx2", &kernels_avx2});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
      isas.push_back({"avx512", &kernels_avx512});
    }
  }
#endif
  return isas;
}

const std::vector<Isa>& available() {
  static const std::vector<Isa> isas = detect();
  return isas;
}

struct Active {
  Isa isa = available().back();
  std::string reason = "the best this CPU supports";
};

Active& active() {
  static Active instance;
  return instance;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : available()) names.emplace_back(isa.name);
  return names;
}

std::string active_isa() { return active().isa.name; }

std::string active_isa_reason() { return active().reason; }

void set_isa(const std::string& name, const std::string& reason) {
  std::string choices;
  for (const Isa& isa : available()) {
    if (name == isa.name) {
      active() = {isa, reason};
      return;
    }
    choices += choices.empty() ? isa.name : std::string(", ") + isa.name;
  }
  throw std::invalid_argument("instruction set '" + name +
                              "' is unknown or not supported by this CPU: expected one of " + choices);
}

namespace {

template <class T>
const KernelsOf<T>& kernels() {
  return *active().isa.kernels;
}

}  // namespace

template <class T>
void linear_forward(const LinearForward<T>& args, int threads) {
  kernels<T>().linear_forward(args, threads);
}

template <class T>
void linear_backward(const LinearBackward<T>& args, int threads) {
  kernels<T>().linear_backward(args, threads);
}

template <class T>
int64_t cross_entropy_forward(const CrossEntropyForward<T>& args, int threads) {
  return kernels<T>().cross_entropy_forward(args, threads);
}

template <class T>
int64_t cross_entropy_backward(const CrossEntropyBackward<T>& args, int threads) {
  return kernels<T>().cross_entropy_backward(args, threads);
}

template <class T>
void sgd_step(const SgdTensor<T>* tensors, int64_t count, const SgdOptions& options, int threads) {
  kernels<T>().sgd_step(tensors, count, options, threads);
}

template <class T>
void mlp_forward(const LinearForward<T>* layers, int64_t depth, int threads) {
  kernels<T>().mlp_forward(layers, depth, threads);
}

template <class T>
void mlp_backward(const LinearBackward<T>* layers, int64_t depth, int threads) {
  kernels<T>().mlp_backward(layers, depth, threads);
}

template <class T>
int64_t train_steps(const TrainSteps<T>& args, int threads) {
  return kernels<T>().train_steps(args, threads);
}

template void linear_forward(const LinearForward<float>&, int);
template void linear_forward(const LinearForward<double>&, int);
template void linear_forward(const LinearForward<BFloat16>&, int);
template void linear_forward(const LinearForward<Float16>&, int);
template void linear_backward(const LinearBackward<float>&, int);
template void linear_backward(const LinearBackward<double>&, int);
template void linear_backward(const LinearBackward<BFloat16>&, int);
template void linear_backward(const LinearBackward<Float16>&, int);
template int64_t cross_entropy_forward(const CrossEntropyForward<float>&, int);
template int64_t cross_entropy_forward(const CrossEntropyForward<double>&, int);
template int64_t cross_entropy_forward(const CrossEntropyForward<BFloat16>&, int);
template int64_t cross_entropy_forward(const CrossEntropyForward<Float16>&, int);
template int64_t cross_entropy_backward(const CrossEntropyBackward<float>&, int);
template int64_t cross_entropy_backward(const CrossEntropyBackward<double>&, int);
template int64_t cross_entropy_backward(const CrossEntropyBackward<BFloat16>&, int);
template int64_t cross_entropy_backward(const CrossEntropyBackward<Float16>&, int);
template void sgd_step(const SgdTensor<float>*, int64_t, const SgdOptions&, int);
template void sgd_step(const SgdTensor<double>*, int64_t, const SgdOptions&, int);
template void sgd_step(const SgdTensor<BFloat16>*, int64_t, const SgdOptions&, int);
template void sgd_step(const SgdTensor<Float16>*, int64_t, const SgdOptions&, int);
template void mlp_forward(const LinearForward<float>*, int64_t, int);
template void mlp_forward(const LinearForward<double>*, int64_t, int);
template void mlp_backward(const LinearBackward<float>*, int64_t, int);
template void mlp_backward(const LinearBackward<double>*, int64_t, int);
template int64_t train_steps(const TrainSteps<float>&, int);
template int64_t train_steps(const TrainSteps<double>&, int);

}  // namespace mnist_ext
