// The mma.sync kernels, as ordinary C++ on the emulator.
#include "../../csrc/kernels/cuda/linear_mma_bfloat16.cu"
#include "../../csrc/kernels/cuda/linear_mma_float16.cu"
#include "../../csrc/kernels/cuda/linear_mma_tf32.cu"
#include "linear_products.h"

namespace {

template <class T>
const char* mma_product(const emulated::Product& arguments) {
  return emulated::error_of([&] {
    const auto product = emulated::typed<T>(arguments);
    if (!mnist_ext::cuda::mma_takes(product, mnist_ext::cuda::Precision::tf32)) throw std::logic_error("not taken");
    emulated::with_workspace(mnist_ext::cuda::mma_workspace_bytes(product),
                             [&](void* workspace) { mnist_ext::cuda::mma_product(product, workspace, nullptr); });
  });
}

}  // namespace

extern "C" {

const char* emulator_mma_bfloat16(const emulated::Product* p) { return mma_product<mnist_ext::BFloat16>(*p); }
const char* emulator_mma_float16(const emulated::Product* p) { return mma_product<mnist_ext::Float16>(*p); }
const char* emulator_mma_float32(const emulated::Product* p) { return mma_product<float>(*p); }

int emulator_bank_conflicts() { return emulator::bank_conflicts; }
}
