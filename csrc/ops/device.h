// Where a CUDA op runs: the device of a tensor, made current, and its current stream.
#pragma once

#include <memory>

#include "../tensors.h"

struct CUstream_st;  // a cudaStream_t points to one

namespace mnist_ext::ops {

class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t);
  ~OnDeviceOf();  // makes the device before current again
  OnDeviceOf(const OnDeviceOf&) = delete;
  OnDeviceOf& operator=(const OnDeviceOf&) = delete;

  CUstream_st* stream() const;

 private:
  struct Guard;
  std::unique_ptr<Guard> guard_;
};

}  // namespace mnist_ext::ops
