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

// exp(x), as exact as an element of T asks for: bfloat16 and float16 keep 8 and 11 bits, which the exponential unit
// alone gives them.
template <class T>
__device__ ComputeType<T> exp_for(ComputeType<T> x) {
  if constexpr (sizeof(T) == 2) {
    return exp2f(x * 1.44269504f);
  } else if constexpr (sizeof(T) == 4) {
    return expf(x);
  } else {
    return exp(x);
  }
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

// Two neighbours of a half dtype in a 32-bit word.
template <class Half>
__device__ uint32_t word_of(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  if constexpr (std::is_same_v<Half, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#else
  Half first, second;
  narrow(low, first);
  narrow(high, second);
  return first.bits | static_cast<uint32_t>(second.bits) << 16;
#endif
}

// One 32-bit word of those that elements lie in: two neighbours of a half dtype, one float, or half of a double.
template <class Half>
__device__ uint32_t word_of(const Pack<Half, 8>& pack, int i) {
  return word_of<Half>(pack.at[2 * i], pack.at[2 * i + 1]);
}
__device__ inline uint32_t word_of(const Pack<float, 4>& pack, int i) {
  uint32_t word;
  memcpy(&word, &pack.at[i], sizeof word);
  return word;
}
__device__ inline uint32_t word_of(const Pack<double, 2>& pack, int i) {
  uint64_t bits;
  memcpy(&bits, &pack.at[i / 2], sizeof bits);
  return static_cast<uint32_t>(i % 2 ? bits >> 32 : bits);
}

// p is aligned to 16 bytes for whole packs.
template <class T, int N>
__device__ void store_pack(T* p, const Pack<T, N>& pack) {
  if constexpr (N == kPack<T> && N > 1) {
    store_vector(p, uint4{word_of(pack, 0), word_of(pack, 1), word_of(pack, 2), word_of(pack, 3)});
  } else {
    for (int k = 0; k < N; ++k) narrow(pack.at[k], p[k]);
  }
}

// 16 bytes to global memory, to which p is aligned. Beside a branch for other addresses, the compiler left to itself
// merges the two into narrower stores for both.
__device__ inline void store_words_global(void* p, uint4 words) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(p)), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
#else
  store_vector(p, words);
#endif
}

// To global memory, whether p is aligned to the pack or not.
template <class T, int N>
__device__ void store_pack_global(T* p, const Pack<T, N>& pack, bool aligned) {
  if constexpr (N == kPack<T> && N > 1) {
    if (aligned) {
      store_words_global(p, uint4{word_of(pack, 0), word_of(pack, 1), word_of(pack, 2), word_of(pack, 3)});
      return;
    }
  } else if constexpr (std::is_same_v<T, float> && N == 2) {
    if (aligned) return store_vector(p, float2{pack.at[0], pack.at[1]});
  }
  for (int k = 0; k < N; ++k) narrow(pack.at[k], p[k]);
}

}  // namespace mnist_ext::cuda
