// Tensor cores as every device from compute capability 8.0 on has them: mma.sync and ldmatrix, one instruction to a
// function. Which lane holds which element is in the PTX ISA, "Matrix Fragments for mma.m16n8k16" and those after it.
#pragma once

#include "elements.cuh"

#ifndef __CUDACC__
#include <tensor_cores.h>
#endif

namespace mnist_ext::cuda {

// Which index of an operand is contiguous in memory: that of A's rows (B's columns), or K.
enum class Major { outer, k };

// Four 8x8 matrices of 16-bit elements. Lane i names row i % 8, 16 bytes, of matrix i / 8; part[j] of lane 4 r + c is
// the c-th 32-bit word of row r of matrix j, or, transposed, the rows 2 c and 2 c + 1 of its column r.
template <bool kTransposed>
__device__ void ldmatrix(uint32_t (&part)[4], const void* row) {
#ifdef __CUDACC__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
                 : "r"(address)
                 : "memory");
  }
#else
  emulator::ldmatrix(kTransposed, part, row);
#endif
}

// A word of shared memory, for a fragment that ldmatrix cannot give: each lane reads its own.
__device__ inline uint32_t load_word(const void* place) {
#ifdef __CUDACC__
  return *static_cast<const uint32_t*>(place);
#else
  return emulator::load_word(place);
#endif
}

// d += a * b^T for a of 16 rows and b of 8, both 32 bytes deep: 16 elements of a half dtype, or 8 floats, which must
// have been rounded to TF32.
template <class T>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
#define MNIST_EXT_MMA(shape_and_types)                                                                                \
  asm volatile("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, BFloat16>) {
    MNIST_EXT_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else if constexpr (std::is_same_v<T, Float16>) {
    MNIST_EXT_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    MNIST_EXT_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#undef MNIST_EXT_MMA
#else
  emulator::mma<T>(d, a, b0, b1);
#endif
}

// To the nearest TF32 (11 bits), ties away from zero.
__device__ inline uint32_t rounded_to_tf32(uint32_t bits) {
#ifdef __CUDACC__
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
#else
  return emulator::rounded_to_tf32(bits);
#endif
}

}  // namespace mnist_ext::cuda
