// tanh(x) for a vector: of small x by Lambert's continued fraction, x / (1 + t), t = x^2 / (3 + x^2 / (5 + ...)); else
// from e = exp(-2 |x|). Both as a correction of something exact, x - x * t / (1 + t) and 1 - 2 e / (1 + e), so that
// what is rounded on the way counts a third at most. The result is within 1.75 ulp (docs/accuracy.md). tanh(NaN) = NaN.
#pragma once

#include "exp_log.h"

namespace mnist_ext::MNIST_EXT_ISA {

template <class T>
MNIST_EXT_INLINE Vec<T> tanh(Vec<T> x) {
  using V = Vec<T>;
  // Of so many terms the error up to |x| = 1 is a hundredth of an ulp.
  constexpr int terms = sizeof(T) == sizeof(float) ? 6 : 10;
  const V one = V::broadcast(T(1)), square = x * x;
  // t = square * b / a: the convergents of a / b = 3 + x^2 / (5 + ...).
  V a = V::broadcast(T(3)), a_before = one, b = one, b_before{};
#pragma GCC unroll 8
  for (int k = 3; k <= terms; ++k) {
    const V odd = V::broadcast(T(2 * k - 1));
    const V next_a = fma(square, a_before, odd * a), next_b = fma(square, b_before, odd * b);
    a_before = a, a = next_a;
    b_before = b, b = next_b;
  }
  const V numerator = square * b;
  const V of_small = x - x * (numerator / (a + numerator));
  const V minus_abs = V{} - max(x, V{} - x);
  const V e = exp(minus_abs + minus_abs);
  const V of_abs = one - (e + e) / (one + e);
  V result;
  result.raw = square.raw <= T(1) ? of_small.raw : x.raw < T(0) ? (V{} - of_abs).raw : of_abs.raw;
  return result;
}

}  // namespace mnist_ext::MNIST_EXT_ISA
