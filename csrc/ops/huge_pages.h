// Large new tensors in huge pages.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace mnist_ext::ops {

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

}  // namespace mnist_ext::ops
