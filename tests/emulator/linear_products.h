// Products of a linear layer for tests: called from Python through ctypes, kernel by kernel.
#pragma once

#include <exception>
#include <string>
#include <vector>

#include "../../csrc/kernels/cuda/linear.h"

namespace emulated {

// As mnist_ext::cuda::Product, for any dtype; tests/emulated.py has the same.
struct Product {
  int64_t rows, columns, depth;
  const void* a;
  int64_t a_strides[2];
  const void* gate;
  int64_t gate_strides[2];
  const void* b;
  int64_t b_strides[2];
  const void* bias;
  int64_t relu;
  void* out;
  void* row_sums;
};

template <class T>
mnist_ext::cuda::Product<T> typed(const Product& p) {
  return {.rows = p.rows,
          .columns = p.columns,
          .depth = p.depth,
          .a = {static_cast<const T*>(p.a), p.a_strides[0], p.a_strides[1]},
          .gate = {static_cast<const T*>(p.gate), p.gate_strides[0], p.gate_strides[1]},
          .b = {static_cast<const T*>(p.b), p.b_strides[0], p.b_strides[1]},
          .bias = static_cast<const T*>(p.bias),
          .relu = p.relu != 0,
          .out = static_cast<T*>(p.out),
          .row_sums = static_cast<T*>(p.row_sums)};
}

// What `call` throws, or null.
template <class Call>
const char* error_of(Call call) {
  static std::string what;
  try {
    call();
  } catch (const std::exception& error) {
    return (what = error.what()).c_str();
  }
  return nullptr;
}

// A workspace of that size with a guard behind it, filled with NaN.
template <class Call>
void with_workspace(int64_t bytes, Call call) {
  constexpr int64_t kGuard = 64;
  std::vector<unsigned char> workspace(static_cast<size_t>(bytes + kGuard), 0xff);
  call(bytes > 0 ? workspace.data() : nullptr);
  for (int64_t i = bytes; i < bytes + kGuard; ++i) {
    if (workspace[static_cast<size_t>(i)] != 0xff) throw std::logic_error("emulator: a write beyond the workspace");
  }
}

}  // namespace emulated
