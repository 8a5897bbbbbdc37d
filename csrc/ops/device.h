// Where an op runs, and new tensors there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>

#include "tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace mnist_ext::ops {

// The device of a tensor, which is current as long as this lives. csrc/bindings says for each library what that is.
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

// From here on glibc's malloc maps an allocation by itself (its mmap threshold never grows beyond) unless so much is
// free in one piece, so that as a rule the advice is about nothing else and ends with the tensor.
inline constexpr std::size_t kHugePagesFrom = std::size_t{32} << 20;

// Asks for huge pages for memory that nothing has been written to. The first write to each page of 4 KiB costs a trip
// to the kernel, which for a gradient of hundreds of MB takes longer than to compute it. Only advice: where it is not
// taken, nothing changes.
inline void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<std::uintptr_t>(memory) + page - 1) / page * page;
  const auto end = (reinterpret_cast<std::uintptr_t>(memory) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// A new tensor on the device of `like`. Straight to the allocator: torch::stable::new_empty goes through the
// dispatcher, which costs more than a small op has to compute.
inline Tensor empty_strided(const Tensor& like, int32_t dtype, const int64_t* sizes, const int64_t* strides,
                            int64_t dims) {
  int32_t type, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, type, index, &handle));
  const Tensor t(handle);
  if (type == aoti_torch_device_type_cpu()) {
    const std::size_t bytes = static_cast<std::size_t>(t.numel()) * t.element_size();
    if (bytes >= kHugePagesFrom) advise_huge_pages(t.mutable_data_ptr(), bytes);
  }
  return t;
}

inline Tensor empty(const Tensor& like, int32_t dtype, const int64_t* sizes, int64_t dims) {
  int64_t strides[kMaxDims];
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return empty_strided(like, dtype, sizes, strides, dims);
}

inline Tensor empty(const Tensor& like, int32_t dtype, std::initializer_list<int64_t> sizes) {
  return empty(like, dtype, sizes.begin(), static_cast<int64_t>(sizes.size()));
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return empty(like, dtype_of(like), sizes);
}

}  // namespace mnist_ext::ops
