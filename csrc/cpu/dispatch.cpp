// Which instruction set the kernels use.
#include <cerrno>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace mnist_ext {
namespace {

struct Isa {
  std::string name;
  const KernelTable* kernels;
  bool is_registered = false;
};

#if defined(__x86_64__)
constexpr long kTileData = 18;  // XFEATURE_XTILE_DATA

bool has_amx() {
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  unsigned a, b, c, features = 0;
  __get_cpuid_count(7, 0, &a, &b, &c, &features);
  constexpr long get_supported = 0x1021;  // ARCH_GET_XCOMP_SUPP
  uint64_t supported = 0;
  return (features & amx_bf16) && (features & amx_tile) && syscall(SYS_arch_prctl, get_supported, &supported) == 0 &&
         (supported >> kTileData & 1);
}
#endif

// A process has to ask for tiles, and not before it uses them: from then on they are 8 KB of each signal's frame, for
// which an alternate signal stack may be too small.
void ask_for_tiles() {
#if defined(__x86_64__)
  constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  if (syscall(SYS_arch_prctl, request_permission, kTileData) != 0) {
    throw std::invalid_argument(std::string("instruction set 'amx': the system refuses its tiles: ") +
                                std::strerror(errno));
  }
#endif
}

std::vector<Isa> detect() {
  std::vector<Isa> isas = {{"baseline", &baseline::kTable}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    isas.push_back({"avx2", &avx2::kTable});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
      // Before the default: where other guests of a host use the same cores, it is the slower one (docs/ladder.md).
      if (has_amx()) isas.push_back({"amx", &amx::kTable});
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
      if (name == "amx") ask_for_tiles();
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
