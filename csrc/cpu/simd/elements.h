// Vectors from and to memory in any of the element types: bfloat16 and float16 are widened to float on the way in and
// rounded to nearest even on the way out.
//
// The conversions are written once for a single element and for a vector of them: U is uint32_t or a vector of it.
// float16 follows Fabian Giesen's half_to_float_fast and float_to_half_fast3_rtne; where the instruction set has the
// conversion (F16C), that is used for vectors.
#pragma once

#include <type_traits>

#include "../../api/dtypes.h"
#include "vec.h"

namespace mnist_ext::MNIST_EXT_ISA {

template <class T>
using Register = Vec<ComputeType<T>>;

template <class T>
inline constexpr bool is_half = !std::is_same_v<T, ComputeType<T>>;  // bfloat16 or float16

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

template <class U>
struct FloatsOf {
  using type = float;
};
template <>
struct FloatsOf<Words> {
  using type = Vec<float>::Raw;
};
template <class U>
using Floats = typename FloatsOf<U>::type;

template <class To, class From>
MNIST_EXT_INLINE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class U>
MNIST_EXT_INLINE Floats<U> widen(U bits, BFloat16) {
  return same_bits<Floats<U>>(bits << 16);
}

template <class U>
MNIST_EXT_INLINE Floats<U> widen(U bits, Float16) {
  // Exponent and mantissa in a float's places, then the difference of the biases: right for subnormals too.
  const U magnitude = same_bits<U>(same_bits<Floats<U>>((bits & 0x7fffu) << 13) * 0x1p112f);
  const U inf_or_nan = magnitude | 0x7f800000u;
  return same_bits<Floats<U>>(((bits & 0x7c00u) == 0x7c00u ? inf_or_nan : magnitude) | (bits & 0x8000u) << 16);
}

template <class U>
MNIST_EXT_INLINE U narrow(Floats<U> x, BFloat16) {
  const U bits = same_bits<U>(x);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U nan = (bits >> 16) | 0x0040u;  // rounding could carry a NaN into infinity
  return x != x ? nan : rounded;
}

template <class U>
MNIST_EXT_INLINE U narrow(Floats<U> x, Float16) {
  const U bits = same_bits<U>(x);
  const U magnitude = bits & 0x7fffffffu;
  // Normal: the difference of the biases, and rounding at bit 13, ties to even.
  const U normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal: adding 0.5 leaves the result, rounded by the addition, in the low bits.
  const U subnormal = same_bits<U>(same_bits<Floats<U>>(magnitude) + 0.5f) - (126u << 23);
  const U finite = magnitude < (113u << 23) ? subnormal : normal;
  const U inf_or_nan = magnitude > 0x7f800000u ? U{} + 0x7e00u : U{} + 0x7c00u;
  return (magnitude >= (143u << 23) ? inf_or_nan : finite) | (bits >> 16 & 0x8000u);
}

// One element.
template <class T>
MNIST_EXT_INLINE ComputeType<T> load_one(const T* p) {
  if constexpr (is_half<T>) {
    return widen<uint32_t>(p->bits, T{});
  } else {
    return *p;
  }
}

template <class T>
MNIST_EXT_INLINE void store_one(T* p, ComputeType<T> x) {
  if constexpr (is_half<T>) {
    p->bits = static_cast<uint16_t>(narrow<uint32_t>(x, T{}));
  } else {
    *p = x;
  }
}

template <class T>
MNIST_EXT_INLINE Vec<float> widen_vector(Halves bits) {
#if defined(__AVX512F__)
  // The masked forms: GCC warns of its own header's unmasked ones.
  if constexpr (std::is_same_v<T, Float16>) return {_mm512_maskz_cvtph_ps(0xffff, same_bits<__m256i>(bits))};
  const Words words = same_bits<Words>(_mm512_maskz_cvtepu16_epi32(0xffff, same_bits<__m256i>(bits)));
#else
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, Float16>) return {_mm256_cvtph_ps(same_bits<__m128i>(bits))};
#endif
  const Words words = __builtin_convertvector(bits, Words);
#endif
  return {widen<Words>(words, T{})};
}

template <class T>
MNIST_EXT_INLINE Halves narrow_vector(Vec<float> x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, Float16>) {
    return same_bits<Halves>(_mm512_maskz_cvtps_ph(0xffff, x.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif defined(__F16C__)
  if constexpr (std::is_same_v<T, Float16>) {
    return same_bits<Halves>(_mm256_cvtps_ph(x.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#endif
  return __builtin_convertvector(narrow<Words>(x.raw, T{}), Halves);
}

// The first `lanes` lanes from p, 0 < lanes <= width; the others are `fill`. Reads nothing behind p[lanes - 1].
template <class T>
MNIST_EXT_INLINE Register<T> load(const T* p, int lanes, ComputeType<T> fill = 0) {
  using V = Register<T>;
  if constexpr (is_half<T>) {
    Halves bits{};
    if (lanes == V::width) {
      std::memcpy(&bits, p, sizeof(bits));
      return widen_vector<T>(bits);
    }
#if defined(__AVX512BW__) && defined(__AVX512VL__) && !MNIST_EXT_SANITIZED
    bits = same_bits<Halves>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << lanes) - 1), p));
#else
#pragma GCC unroll 8
    for (int i = 0; i < V::width; ++i) {
      if (i < lanes) bits[i] = p[i].bits;  // lanes of constant numbers stay in the register
    }
#endif
    return first_lanes(widen_vector<T>(bits), lanes, fill);
  } else {
    return lanes == V::width ? V::load(p) : V::load_partial(p, lanes, fill);
  }
}

// Stores the first `lanes` lanes.
template <class T>
MNIST_EXT_INLINE void store(T* p, Register<T> x, int lanes) {
  using V = Register<T>;
  if constexpr (is_half<T>) {
    const Halves bits = narrow_vector<T>(x);
    if (lanes == V::width) {
      std::memcpy(p, &bits, sizeof(bits));
      return;
    }
#if defined(__AVX512BW__) && defined(__AVX512VL__) && !MNIST_EXT_SANITIZED
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << lanes) - 1), same_bits<__m256i>(bits));
#else
    for (int i = 0; i < lanes; ++i) p[i].bits = bits[i];
#endif
  } else if (lanes == V::width) {
    x.store(p);
  } else {
    x.store_partial(p, lanes);
  }
}

// Asks for the cache line at p. A hint: p may point anywhere.
MNIST_EXT_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

// Calls body(begin, lanes) for each vector of [0, n). In all calls but the last, lanes is the width, as a constant.
template <class T, class Body>
MNIST_EXT_INLINE void for_each_vector(int64_t n, const Body& body) {
  constexpr int width = Register<T>::width;
  int64_t i = 0;
  for (; i + width <= n; i += width) body(i, width);
  if (i < n) body(i, static_cast<int>(n - i));
}

}  // namespace mnist_ext::MNIST_EXT_ISA
