// The Python module mnist_ext._C. Importing it registers torch.ops.mnist_ext, with the CPU's kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstdlib>
#include <optional>

#include "../cpu/kernels.h"
#include "../cpu/threads/scratch.h"
#include "../ops/device.h"
#include "../ops/schemas.h"

namespace mnist_ext::ops {
namespace {

// More would be missed by others; to allocate so much is little beside computing with it.
constexpr int64_t kLargestKept = int64_t{64} << 20;

}  // namespace

struct OnDevice::State {
  std::optional<Temporary> workspace;
};

OnDevice::OnDevice(const Tensor&) {}
OnDevice::~OnDevice() = default;

Launch OnDevice::launch() const { return {.threads = static_cast<int>(torch::stable::get_num_threads())}; }

void* OnDevice::workspace(int64_t bytes) {
  if (bytes == 0) return nullptr;
  const auto size = static_cast<std::size_t>(bytes);
  if (bytes <= kLargestKept) return scratch(Scratch::workspace, size);
  if (!state_) state_ = std::make_unique<State>();
  return state_->workspace.emplace(size).data();
}

STABLE_TORCH_LIBRARY(mnist_ext, m) { define_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(mnist_ext, CPU, m) { implement_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(mnist_ext, CompositeExplicitAutograd, m) { implement_mlp_of_other_tensors(m); }

}  // namespace mnist_ext::ops

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
  m.def(
      "register_kernels",
      [](const std::string& name, std::uintptr_t address) {
        mnist_ext::register_kernels(name, reinterpret_cast<const mnist_ext::KernelTable*>(address));
      },
      pybind11::arg("name"), pybind11::arg("address"),
      "For tests: let set_isa(name) choose the kernels of the KernelTable at this address.");
}
