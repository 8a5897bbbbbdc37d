// The Python module mnist_ext._C: what is not a tensor. Importing it also registers torch.ops.mnist_ext.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>

#include "../kernels/cpu/isa.h"

PYBIND11_MODULE(_C, m) {
  // An exception here becomes an ImportError with its message.
  if (const char* isa = std::getenv("MNIST_EXT_ISA"); isa != nullptr && *isa != '\0') {
    mnist_ext::set_isa(isa, "MNIST_EXT_ISA asks for it");
  }
  m.attr("torch_built_with") = MNIST_EXT_TORCH_VERSION;
  m.attr("no_cuda_reason") = MNIST_EXT_NO_CUDA_REASON;  // "" where mnist_ext._cuda was built
  m.def("available_isas", &mnist_ext::available_isas, "Instruction sets in this binary that this CPU can run.");
  m.def("active_isa", &mnist_ext::active_isa, "The instruction set in use.");
  m.def("active_isa_reason", &mnist_ext::active_isa_reason, "Why that one.");
  m.def("set_isa", &mnist_ext::set_isa, pybind11::arg("name"), pybind11::arg("reason") = "set_isa() was called",
        "Use this instruction set from now on; ValueError if this CPU cannot run it.");
}
