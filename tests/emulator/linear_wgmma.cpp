// The wgmma kernels, as ordinary C++ on the emulator.
#include "../../csrc/kernels/cuda/linear_wgmma_bfloat16.cu"
#include "../../csrc/kernels/cuda/linear_wgmma_float16.cu"
#include "../../csrc/kernels/cuda/linear_wgmma_tf32.cu"
#include "linear_products.h"

namespace {

// Of any size, also where another kernel would be taken as the faster one.
template <class T>
const char* wgmma_product(const emulated::Product& arguments) {
  return emulated::error_of([&] {
    const auto product = emulated::typed<T>(arguments);
    if (!mnist_ext::cuda::wgmma_can(product) || !mnist_ext::cuda::has_wgmma<T>()) throw std::logic_error("not taken");
    emulated::with_workspace(mnist_ext::cuda::wgmma_workspace_bytes(product),
                             [&](void* workspace) { mnist_ext::cuda::wgmma_product(product, workspace, nullptr); });
  });
}

}  // namespace

extern "C" {

const char* emulator_wgmma_bfloat16(const emulated::Product* p) { return wgmma_product<mnist_ext::BFloat16>(*p); }
const char* emulator_wgmma_float16(const emulated::Product* p) { return wgmma_product<mnist_ext::Float16>(*p); }
const char* emulator_wgmma_float32(const emulated::Product* p) { return wgmma_product<float>(*p); }

bool emulator_wgmma_takes_float32(const emulated::Product* p, bool tf32) {
  using mnist_ext::cuda::Precision;
  return mnist_ext::cuda::wgmma_takes(emulated::typed<float>(*p), tf32 ? Precision::tf32 : Precision::full);
}
}
