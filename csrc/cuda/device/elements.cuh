// Elements of the four dtypes in registers: loaded as, computed in and stored from ComputeType<T>, one or 16 bytes at a
// time.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "../../api/dtypes.h"
#include "device.cuh"

namespace mnist_ext::cuda {

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
__device__ inline float widen(Float16 x) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#elif defined(__CUDACC__)
  return x.bits;  // nvcc's host pass, which is never run
#else
  _Float16 value;
  memcpy(&value, &x.bits, sizeof value);
  return static_cast<float>(value);
#endif
}

// To the nearest, ties to even.
__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(double x, double& out) { out = x; }
__device__ inline void narrow(float x, BFloat16& out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  out.bits = static_cast<uint16_t>(x != x ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}
__device__ inline void narrow(float x, Float16& out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#elif defined(__CUDACC__)
  out.bits = static_cast<uint16_t>(x);  // nvcc's host pass, which is never run
#else
  const _Float16 value = static_cast<_Float16>(x);
  memcpy(&out.bits, &value, sizeof value);
#endif
}

// What is left of x once it has been stored as T.
template <class T>
__device__ ComputeType<T> rounded(ComputeType<T> x) {
  T stored;
  narrow(x, stored);
  return widen(stored);
}

// N contiguous elements.
template <class T, int N>
struct Pack {
  static constexpr int size = N;

  ComputeType<T> at[N];
};

template <class T>
inline constexpr int kPack = 16 / sizeof(T);  // elements in one access

template <class T>
__device__ inline int64_t elements_past_alignment(const T* p) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

// p is aligned to 16 bytes for whole packs.
template <class T, int N>
__device__ Pack<T, N> load_pack(const T* p) {
  Pack<T, N> pack;
  if constexpr (N == kPack<T> && N > 1) {
    const uint4 bits = load_vector<uint4>(p);
    T elements[N];
    memcpy(elements, &bits, sizeof bits);
    for (int k = 0; k < N; ++k) pack.at[k] = widen(elements[k]);
  } else {
    for (int k = 0; k < N; ++k) pack.at[k] = widen(p[k]);
  }
  return pack;
}

// The elements of a pack as they lie in memory.
template <class Words, class T, int N>
__device__ Words words_of(const Pack<T, N>& pack) {
  static_assert(sizeof(Words) == N * sizeof(T));
  T elements[N];
#pragma unroll
  for (int k = 0; k < N; ++k) narrow(pack.at[k], elements[k]);
  Words words;
  memcpy(&words, elements, sizeof words);
  return words;
}

// p is aligned to 16 bytes for whole packs.
template <class T, int N>
__device__ void store_pack(T* p, const Pack<T, N>& pack) {
  if constexpr (N == kPack<T> && N > 1) {
    store_vector(p, words_of<uint4>(pack));
  } else {
    for (int k = 0; k < N; ++k) narrow(pack.at[k], p[k]);
  }
}

// To global memory, whether p is aligned to the pack or not.
template <class T, int N>
__device__ void store_pack_global(T* p, const Pack<T, N>& pack, bool aligned) {
  if constexpr (N == kPack<T> && N > 1) {
#ifdef __CUDA_ARCH__
    // The compiler left to itself merges both branches into narrower stores.
    if (aligned) {
      const uint4 words = words_of<uint4>(pack);
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                   :
                   : "l"(__cvta_generic_to_global(p)), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
                   : "memory");
      return;
    }
#else
    if (aligned) return store_pack(p, pack);
#endif
  } else if constexpr (N == 2) {
    using Words = std::conditional_t<sizeof(T) == 4, uint64_t, uint32_t>;
    if (aligned) return store_vector(p, words_of<Words>(pack));
  }
  for (int k = 0; k < N; ++k) narrow(pack.at[k], p[k]);
}

}  // namespace mnist_ext::cuda
