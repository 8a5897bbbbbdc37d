// A square block of a vector's width, transposed in registers.
#pragma once

#include <utility>

#include "vec.h"

namespace mnist_ext::MNIST_EXT_ISA {

// Swaps the off-diagonal quarters of each 2h x 2h block that rows a and b = a + h belong to (Eklundh's method).
template <int h, class Raw, std::size_t... K>
MNIST_EXT_INLINE void swap_quarters(Raw& a, Raw& b, std::index_sequence<K...>) {
  constexpr int width = sizeof...(K);
  const Raw first = shuffle<static_cast<int>(K & h ? width + K - h : K)...>(a, b);
  b = shuffle<static_cast<int>(K & h ? width + K : K + h)...>(a, b);
  a = first;
}

template <class T, int h = Vec<T>::width / 2>
MNIST_EXT_INLINE void transpose(Vec<T> (&rows)[Vec<T>::width]) {
  constexpr int width = Vec<T>::width;
#pragma GCC unroll 16
  for (int i = 0; i < width; ++i) {
    if ((i & h) == 0) swap_quarters<h>(rows[i].raw, rows[i + h].raw, std::make_index_sequence<width>{});
  }
  if constexpr (h > 1) transpose<T, h / 2>(rows);
}

}  // namespace mnist_ext::MNIST_EXT_ISA
