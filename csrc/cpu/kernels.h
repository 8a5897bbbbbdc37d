// The CPU's tables of kernels, one for each instruction set, and which of them is used: that of the best that this CPU
// has, or of the one asked for.
#pragma once

#include <string>
#include <vector>

#include "../api/backend.h"

namespace mnist_ext {

// kernels.cpp, compiled for each:
namespace baseline {
extern const KernelTable kTable;  // any CPU of this architecture: SSE2 on x86-64, NEON on AArch64
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kTable;  // AVX2, FMA and F16C
}
namespace avx512 {
extern const KernelTable kTable;  // AVX-512 F, DQ, BW and VL
}
namespace amx {
extern const KernelTable kTable;  // the same, and tiles of bfloat16 (simd/amx.h)
}
#endif

// In every table, for float and double: training steps, as programs that the table in use runs (train_steps.cpp).
namespace cpu {
// A gradient that sums over more examples is not finished in registers: a tile adds up kBlockK (product/block.h) at
// most.
inline constexpr int64_t kLargestFusedK = 256;

// Two cores' second-level caches hold about as much.
inline constexpr BlockTraits kBlockTraits = {
    .cached_bytes = int64_t{4} << 20, .most_bytes = int64_t{24} << 20, .in_place = true, .flops_per_byte = 16};

template <class T>
BadExample train_steps(const TrainSteps<T>&, void* workspace, StepGraph*, const Launch&);
template <class T>
int64_t train_steps_workspace_bytes(const TrainSteps<T>&);
}  // namespace cpu

// Names of the instruction sets this binary holds and this CPU can run, from the plainest to the default.
std::vector<std::string> available_isas();

// The one in use, and why.
std::string active_isa();
std::string active_isa_reason();

// Use the named one from now on; not to be called while kernels run. Throws std::invalid_argument, naming the choices,
// for a name that is unknown or that this CPU cannot run; and for amx where the system refuses its tiles.
void set_isa(const std::string& name, const std::string& reason);

// Adds kernels for CPU tensors under a name that set_isa() takes; in place of those of that name. For tests: the CUDA
// kernels on an emulator.
void register_kernels(const std::string& name, const KernelTable* kernels);

}  // namespace mnist_ext
