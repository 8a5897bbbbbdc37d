// exp(x) for a vector of differences from a maximum: x <= 0, or NaN.
//
// exp(x) = 2^n * exp(r), n = round(x / ln 2), r = x - n * ln 2 in two parts (Cody and Waite), |r| <= ln(2)/2, exp(r) by
// its Taylor polynomial: degree 7 (float) and 13 (double) leave an error of 0.1 ulp before rounding. The result is
// within 1 ulp or so; subnormal results may be rounded twice. exp(-inf) = 0, exp(NaN) = NaN.
#pragma once

#include "vec.h"

namespace mnist_ext::MNIST_EXT_ISA {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr int degree = 7;
  static constexpr float lowest = -104.0f;  // exp is 0 below
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr int mantissa_bits = 23, exponent_bias = 127;
};

template <>
struct ExpConstants<double> {
  static constexpr int degree = 13;
  static constexpr double lowest = -746.0;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int mantissa_bits = 52, exponent_bias = 1023;
};

// The nearest integer, for |x| < 2^22.
template <class T>
MNIST_EXT_INLINE Vec<T> round_small(Vec<T> x) {
  const Vec<T> magic = Vec<T>::broadcast(ExpConstants<T>::round_magic);
  return (x + magic) - magic;
}

// 2^n for integral n in the normal exponent range: n + bias, shifted into the exponent field.
template <class T>
MNIST_EXT_INLINE Vec<T> exp2_integral(Vec<T> n) {
  using C = ExpConstants<T>;
  const Vec<T> biased = n + Vec<T>::broadcast(C::round_magic + C::exponent_bias);
  typename Vec<T>::RawBits bits;
  std::memcpy(&bits, &biased.raw, sizeof(bits));
  bits <<= C::mantissa_bits;
  Vec<T> power;
  std::memcpy(&power.raw, &bits, sizeof(bits));
  return power;
}

// p * 2^n, also where 2^n itself lies outside the exponent range.
template <class T>
MNIST_EXT_INLINE Vec<T> scale_by_power(Vec<T> p, Vec<T> n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return {_mm512_maskz_scalef_ps(0xffff, p.raw, n.raw)};  // masked: GCC warns of its own header's other form
  } else {
    return {_mm512_maskz_scalef_pd(0xff, p.raw, n.raw)};
  }
#else
  const Vec<T> half = round_small(n * Vec<T>::broadcast(T(0.5)));  // two factors, both inside it
  return p * exp2_integral(half) * exp2_integral(n - half);
#endif
}

constexpr double inverse_factorial(int k) { return k <= 1 ? 1.0 : inverse_factorial(k - 1) / k; }

template <class T>
MNIST_EXT_INLINE Vec<T> exp(Vec<T> x) {
  using C = ExpConstants<T>;
  using V = Vec<T>;
  x = max(V::broadcast(C::lowest), x);  // NaN passes: it is the second operand
  const V n = round_small(x * V::broadcast(T(1.4426950408889634)));
  V r = fma(n, V::broadcast(-C::ln2_high), x);
  r = fma(n, V::broadcast(-C::ln2_low), r);
  V p = V::broadcast(T(inverse_factorial(C::degree)));
#pragma GCC unroll 16
  for (int k = C::degree - 1; k >= 0; --k) p = fma(p, r, V::broadcast(T(inverse_factorial(k))));
  return scale_by_power(p, n);
}

}  // namespace mnist_ext::MNIST_EXT_ISA
