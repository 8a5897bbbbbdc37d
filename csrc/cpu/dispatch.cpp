// Which instruction set the kernels use.
#include <stdexcept>

#include "kernels.h"

namespace mnist_ext {
namespace {

struct Isa {
  std::string name;
  const KernelTable* kernels;
  bool is_registered = false;
};

std::vector<Isa> detect() {
  std::vector<Isa> isas = {{"baseline", &baseline::kTable}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    isas.push_back({"avx2", &avx2::kTable});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
      isas.push_back({"avx512", &avx512::kTable});
    }
  }
#endif
  return isas;
}

// This CPU's, then those that are registered.
std::vector<Isa>& isas() {
  static std::vector<Isa> all = detect();
  return all;
}

struct Active {
  Isa isa = detect().back();
  std::string reason = "the best this CPU supports";
};

Active& active() {
  static Active instance;
  return instance;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) {
    if (!isa.is_registered) names.push_back(isa.name);
  }
  return names;
}

std::string active_isa() { return active().isa.name; }

std::string active_isa_reason() { return active().reason; }

void set_isa(const std::string& name, const std::string& reason) {
  std::string choices;
  for (const Isa& isa : isas()) {
    if (name == isa.name) {
      active() = {isa, reason};
      return;
    }
    choices += (choices.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("instruction set '" + name +
                              "' is unknown or not supported by this CPU: expected one of " + choices);
}

void register_kernels(const std::string& name, const KernelTable* kernels) {
  std::erase_if(isas(), [&](const Isa& isa) { return isa.name == name; });
  isas().push_back({name, kernels, true});
}

const KernelTable& kernel_table() { return *active().isa.kernels; }

}  // namespace mnist_ext
