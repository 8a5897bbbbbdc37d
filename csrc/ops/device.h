// Where an op runs. csrc/bindings says for each library what that is.
#pragma once

#include <memory>

#include "tensors.h"

namespace mnist_ext::ops {

// The device of a tensor, which is current as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  // All of the CPU's threads that PyTorch allows, or the current stream.
  Launch launch() const;

  // Memory for kernels, until the next call or as long as this lives; null for 0 bytes.
  void* workspace(int64_t bytes);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace mnist_ext::ops
