// Single tensor-core instructions, for tests of what each lane holds; all arrays are indexed by lane first.
#include "../../csrc/cuda/device/tensor_cores.cuh"
#include "library.h"

namespace {

using namespace mnist_ext;
using namespace mnist_ext::cuda;

template <class T>
void mma_kernel_of(const uint32_t* a, const uint32_t* b, float* d) {
  const unsigned lane = threadIdx.x;
  uint32_t mine[4];
  float sum[4];
  memcpy(mine, a + 4 * lane, sizeof mine);
  memcpy(sum, d + 4 * lane, sizeof sum);
  mma<T>(sum, mine, b[2 * lane], b[2 * lane + 1]);
  memcpy(d + 4 * lane, sum, sizeof sum);
}

template <bool kTransposed>
void ldmatrix_kernel(const uint16_t* rows, uint32_t* parts) {
  uint16_t* shared = reinterpret_cast<uint16_t*>(shared_memory());
  memcpy(shared + 8 * threadIdx.x, rows + 8 * threadIdx.x, 16);
  __syncthreads();
  uint32_t part[4];
  ldmatrix<kTransposed>(part, shared + 8 * threadIdx.x);
  memcpy(parts + 4 * threadIdx.x, part, sizeof part);
}

}  // namespace

extern "C" {

// a: [32, 4] words, b: [32, 2] words, d: [32, 4] floats.
EXPORTED void emulator_one_mma_bfloat16(const uint32_t* a, const uint32_t* b, float* d) {
  launch("mma", mma_kernel_of<BFloat16>, {1, 32}, nullptr, a, b, d);
}
EXPORTED void emulator_one_mma_float16(const uint32_t* a, const uint32_t* b, float* d) {
  launch("mma", mma_kernel_of<Float16>, {1, 32}, nullptr, a, b, d);
}
EXPORTED void emulator_one_mma_float32(const uint32_t* a, const uint32_t* b, float* d) {
  launch("mma", mma_kernel_of<float>, {1, 32}, nullptr, a, b, d);
}

// rows: [32, 8] elements of four matrices, parts: [32, 4] words.
EXPORTED void emulator_one_ldmatrix(bool transposed, const uint16_t* rows, uint32_t* parts) {
  launch("ldmatrix", transposed ? ldmatrix_kernel<true> : ldmatrix_kernel<false>, {1, 32, 1, 512}, nullptr, rows,
         parts);
}
}
