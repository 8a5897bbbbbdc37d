// Which instruction set the kernels use: the best that this CPU has, or the one asked for.
#pragma once

#include <string>
#include <vector>

namespace mnist_ext {

// Names of the instruction sets this binary holds and this CPU can run, from the plainest to the best.
std::vector<std::string> available_isas();

// The one in use, and why.
std::string active_isa();
std::string active_isa_reason();

// Use the named one from now on; not to be called while kernels run. Throws std::invalid_argument, naming the choices,
// for a name that is unknown or that this CPU cannot run.
void set_isa(const std::string& name, const std::string& reason);

}  // namespace mnist_ext
