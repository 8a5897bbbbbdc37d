// tanh(x) for a vector: of small x a convergent of Lambert's continued fraction, x / (1 + x^2 / (3 + x^2 / (5 + ...))),
// which keeps their relative precision; else from exp(-2 |x|). The result is within 2 ulp or so. tanh(NaN) = NaN.
#pragma once

#include "exp_log.h"

namespace mnist_ext::MNIST_EXT_ISA {

template <class T>
MNIST_EXT_INLINE Vec<T> tanh(Vec<T> x) {
  using V = Vec<T>;
  // Up to |x| = 1/2 the error of so many terms is a hundredth of an ulp.
  constexpr int terms = sizeof(T) == sizeof(float) ? 5 : 8;
  const V one = V::broadcast(T(1)), square = x * x;
  V numerator = x, numerator_before{}, denominator = one, denominator_before = one;
#pragma GCC unroll 8
  for (int k = 2; k <= terms; ++k) {
    const V odd = V::broadcast(T(2 * k - 1));
    const V next_numerator = fma(square, numerator_before, odd * numerator);
    const V next_denominator = fma(square, denominator_before, odd * denominator);
    numerator_before = numerator, numerator = next_numerator;
    denominator_before = denominator, denominator = next_denominator;
  }
  const V of_small = numerator / denominator;
  const V minus_x = V{} - x, minus_abs = V{} - max(x, minus_x);
  const V e = exp(minus_abs + minus_abs);
  const V of_abs = (one - e) / (one + e);
  V result;
  result.raw = square.raw <= T(0.25) ? of_small.raw : x.raw < T(0) ? (V{} - of_abs).raw : of_abs.raw;
  return result;
}

}  // namespace mnist_ext::MNIST_EXT_ISA
