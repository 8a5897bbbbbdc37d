// Which instruction set the kernels use: the best that this CPU has, or the one asked for.
#pragma once

#include <string>
#include <vector>

#include "../../api/backend.h"

namespace mnist_ext {

extern const KernelTable kernels_baseline;
#if defined(__x86_64__)
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
#endif

// Names of the instruction sets this binary holds and this CPU can run, from the plainest to the best.
std::vector<std::string> available_isas();

// The one in use, and why.
std::string active_isa();
std::string active_isa_reason();

// Use the named one from now on; not to be called while kernels run. Throws std::invalid_argument, naming the choices,
// for a name that is unknown or that this CPU cannot run.
void set_isa(const std::string& name, const std::string& reason);

// Adds kernels for CPU tensors under a name that set_isa() takes; in place of those of that name. For tests: the CUDA
// kernels on an emulator.
void register_kernels(const std::string& name, const KernelTable* kernels);

}  // namespace mnist_ext
