// exp(x) for a vector of differences from a maximum: x <= 0, or NaN.
//
// exp(x) = 2^n * exp(r), n = round(x / ln 2), r = x - n * ln 2 in two parts (Cody and Waite), |r| <= ln(2)/2, exp(r) by
// its Taylor polynomial, of a degree that leaves an error of 0.1 ulp before rounding. With AVX-512, n is rounded to
// sixteenths instead (double: eighths), for which half the degree will do: the fractional powers of 2 fit into one
// register, from which a permutation fetches them. The result is within 1.25 ulp, of float32 for every input
// (docs/accuracy.md).
//
// What is below the smallest normal number becomes 0, exp(-inf) too, and is kept from the multiplication by 2^n: a core
// of Intel's takes more than a hundred cycles over a vector that underflows in one lane. exp(NaN) = NaN.
#pragma once

#include <limits>

#include "vec.h"

namespace mnist_ext::MNIST_EXT_ISA {

#if defined(__AVX512F__)
inline constexpr bool kFetchesPowers = true;
#else
inline constexpr bool kFetchesPowers = false;
#endif

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr int steps = kFetchesPowers ? 16 : 1;  // n is a multiple of 1 / steps
  static constexpr int degree = kFetchesPowers ? 3 : 7;
  static constexpr float lowest = -87.33654f;  // exp is below the smallest normal number from here on
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr int mantissa_bits = 23, exponent_bias = 127;
};

template <>
struct ExpConstants<double> {
  static constexpr int steps = kFetchesPowers ? 8 : 1;
  static constexpr int degree = kFetchesPowers ? 8 : 13;
  static constexpr double lowest = -708.396418532264;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int mantissa_bits = 52, exponent_bias = 1023;
};

constexpr double inverse_factorial(int k) { return k <= 1 ? 1.0 : inverse_factorial(k - 1) / k; }

// The terms of exp(r) from r^first on, divided by r^first.
template <int first, class T>
MNIST_EXT_INLINE Vec<T> exp_terms(Vec<T> r) {
  constexpr int degree = ExpConstants<T>::degree;
  Vec<T> p = Vec<T>::broadcast(T(inverse_factorial(degree)));
#pragma GCC unroll 16
  for (int k = degree - 1; k >= first; --k) p = fma(p, r, Vec<T>::broadcast(T(inverse_factorial(k))));
  return p;
}

#if defined(__AVX512F__)

// 2^(n - floor(n)), by the low bits of n + magic.
MNIST_EXT_INLINE Vec<float> fractional_power(Vec<float> n_and_magic) {
  const __m512 powers = _mm512_setr_ps(1.0f, 1.0442737824f, 1.0905077327f, 1.1387886348f, 1.1892071150f, 1.2418578121f,
                                       1.2968395547f, 1.3542555469f, 1.4142135624f, 1.4768261459f, 1.5422108254f,
                                       1.6104903319f, 1.6817928305f, 1.7562521604f, 1.8340080864f, 1.9152065614f);
  return {_mm512_maskz_permutexvar_ps(0xffff, _mm512_castps_si512(n_and_magic.raw), powers)};
}

MNIST_EXT_INLINE Vec<double> fractional_power(Vec<double> n_and_magic) {
  const __m512d powers =
      _mm512_setr_pd(1.0, 1.0905077326652576592, 1.1892071150027210667, 1.2968395546510096659, 1.4142135623730950488,
                     1.5422108254079408236, 1.6817928305074290861, 1.8340080864093424635);
  return {_mm512_maskz_permutexvar_pd(0xff, _mm512_castpd_si512(n_and_magic.raw), powers)};
}

// p * 2^floor(n), or 0 where x is below the lowest.
MNIST_EXT_INLINE Vec<float> scale_by_power(Vec<float> p, Vec<float> n, Vec<float> x) {
  const __mmask16 kept = _mm512_cmp_ps_mask(x.raw, _mm512_set1_ps(ExpConstants<float>::lowest), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(kept, p.raw, n.raw)};
}

MNIST_EXT_INLINE Vec<double> scale_by_power(Vec<double> p, Vec<double> n, Vec<double> x) {
  const __mmask8 kept = _mm512_cmp_pd_mask(x.raw, _mm512_set1_pd(ExpConstants<double>::lowest), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_pd(kept, p.raw, n.raw)};
}

#else

// p * 2^n for integral n, or 0 where x is below the lowest. 2^n is n + bias, shifted into the exponent field.
template <class T>
MNIST_EXT_INLINE Vec<T> scale_by_power(Vec<T> p, Vec<T> n, Vec<T> x) {
  using C = ExpConstants<T>;
  const Vec<T> biased = n + Vec<T>::broadcast(C::round_magic + C::exponent_bias);
  typename Vec<T>::RawBits bits;
  std::memcpy(&bits, &biased.raw, sizeof(bits));
  bits <<= C::mantissa_bits;
  Vec<T> power;
  std::memcpy(&power.raw, &bits, sizeof(bits));
  return {x.raw < C::lowest ? typename Vec<T>::Raw{} : (p * power).raw};
}

#endif

template <class T>
MNIST_EXT_INLINE Vec<T> exp(Vec<T> x) {
  using C = ExpConstants<T>;
  using V = Vec<T>;
  // Where 2^n is a factor of its own, n must be in the exponent range. NaN passes: it is the second operand.
  const V in_range = kFetchesPowers ? x : max(V::broadcast(C::lowest), x);
  const V magic = V::broadcast(C::round_magic / C::steps);
  const V n_and_magic = fma(in_range, V::broadcast(T(1.4426950408889634)), magic);
  const V n = n_and_magic - magic;
  V r = fma(n, V::broadcast(-C::ln2_high), in_range);
  r = fma(n, V::broadcast(-C::ln2_low), r);
  V p;
  if constexpr (kFetchesPowers) {
    const V power = fractional_power(n_and_magic);
    p = fma(power * r, exp_terms<1>(r), power);  // power + power * (exp(r) - 1)
  } else {
    p = exp_terms<0>(r);
  }
  return scale_by_power(p, n, x);
}

// log(x) for a vector of sums of exponentials: x >= 1, or NaN.
//
// x = 2^k * (1 + f), sqrt(1/2) <= 1 + f < sqrt(2); with s = f / (2 + f), log(1 + f) = 2 s + 2/3 s^3 + 2/5 s^5 + ...,
// arranged as in fdlibm's log: f - s * (f - R). The result is within 0.9 ulp (docs/accuracy.md). log(inf) = inf,
// log(NaN) = NaN.
template <class T>
MNIST_EXT_INLINE Vec<T> log(Vec<T> x) {
  using V = Vec<T>;
  using C = ExpConstants<T>;
  using Bits = typename V::RawBits;
  constexpr bool single = sizeof(T) == sizeof(float);
  constexpr auto sqrt_half = static_cast<typename V::Bits>(single ? 0x3f3504f3 : 0x3fe6a09e667f3bcd);
  Bits bits;
  std::memcpy(&bits, &x.raw, sizeof(bits));
  const Bits exponent = (bits - sqrt_half) >> C::mantissa_bits;
  bits -= exponent << C::mantissa_bits;
  V f;
  std::memcpy(&f.raw, &bits, sizeof(bits));
  f = f - V::broadcast(T(1));
  const V k = {__builtin_convertvector(exponent, typename V::Raw)};

  const V s = {f.raw / (f.raw + T(2))};
  const V z = s * s;
  constexpr int terms = single ? 4 : 11;
  V r = V::broadcast(T(2.0 / (2 * terms + 1)));
#pragma GCC unroll 16
  for (int i = terms - 1; i >= 1; --i) r = fma(r, z, V::broadcast(T(2.0 / (2 * i + 1))));
  r = r * z;
  const V correction = s * (f - r) - k * V::broadcast(C::ln2_low);
  const V result = fma(k, V::broadcast(C::ln2_high), f - correction);
  return {x.raw < std::numeric_limits<T>::infinity() ? result.raw : x.raw};
}

}  // namespace mnist_ext::MNIST_EXT_ISA
