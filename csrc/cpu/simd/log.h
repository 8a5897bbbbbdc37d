// log(x) for a vector of sums of exponentials: x >= 1, or NaN.
//
// x = 2^k * (1 + f), sqrt(1/2) <= 1 + f < sqrt(2); with s = f / (2 + f), log(1 + f) = 2 s + 2/3 s^3 + 2/5 s^5 + ...,
// arranged as in fdlibm's log: f - s * (f - R). The result is within 1 ulp or so. log(inf) = inf, log(NaN) = NaN.
#pragma once

#include <limits>

#include "exp.h"

namespace mnist_ext::MNIST_EXT_ISA {

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
