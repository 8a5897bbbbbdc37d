// Element types of the kernels: how an element lies in memory, and in which type it is computed with.
#pragma once

#include <cstdint>

namespace mnist_ext {

struct BFloat16 {  // the upper half of a float
  uint16_t bits;
};

struct Float16 {  // IEEE binary16
  uint16_t bits;
};

template <class T>
struct ComputeTypeOf {
  using type = T;
};
template <>
struct ComputeTypeOf<BFloat16> {
  using type = float;
};
template <>
struct ComputeTypeOf<Float16> {
  using type = float;
};

// float for BFloat16 and Float16, else T itself.
template <class T>
using ComputeType = typename ComputeTypeOf<T>::type;

}  // namespace mnist_ext
