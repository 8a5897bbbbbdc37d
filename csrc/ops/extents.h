// Which tensors share memory: what is updated in place needs memory of its own.
#pragma once

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "tensors.h"

namespace mnist_ext::ops {

// What lies in [begin, end) of memory.
struct Extent {
  const char *begin, *end;
  int32_t number;  // the caller's, to know it by
  bool written;
};

inline Extent extent_of(const Tensor& t, int32_t number, bool written) {
  const char* begin = static_cast<const char*>(t.const_data_ptr());
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) == 0) return {begin, begin, number, written};
    last += (t.size(i) - 1) * t.stride(i);
  }
  return {begin, begin + (last + 1) * static_cast<int64_t>(t.element_size()), number, written};
}

// Two that overlap, of which one at least is written, if there are such. Sorts the extents.
inline std::optional<std::pair<Extent, Extent>> overlapping(std::vector<Extent>& extents) {
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  const Extent* furthest = nullptr;  // of those before, which all begin before
  const Extent* furthest_written = nullptr;
  for (const Extent& e : extents) {
    if (e.begin == e.end) continue;
    const Extent* other = e.written ? furthest : furthest_written;
    if (other && other->end > e.begin) return std::pair(*other, e);
    if (!furthest || furthest->end < e.end) furthest = &e;
    if (e.written && (!furthest_written || furthest_written->end < e.end)) furthest_written = &e;
  }
  return std::nullopt;
}

}  // namespace mnist_ext::ops
