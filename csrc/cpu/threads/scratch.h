// Memory that kernels work in.
#pragma once

#include <cstddef>

namespace mnist_ext {

// At least `bytes` of memory aligned to 64 bytes, kept by the calling thread until it ends or asks for more (a fresh
// allocation of this size would cost its page faults on each call). Each slot is a buffer of its own.
enum class Scratch {
  a_tiles,
  b_block,
  piece,
  packed_a,
  packed_rows,
  packed_columns,
  logits_tile,
  exponentials,
  workspace,
  count
};
// Throws std::bad_alloc.
void* scratch(Scratch slot, std::size_t bytes);

// Memory for one call, aligned to 64 bytes; null for 0 bytes.
class Temporary {
 public:
  explicit Temporary(std::size_t bytes);  // throws std::bad_alloc
  ~Temporary();
  Temporary(const Temporary&) = delete;
  Temporary& operator=(const Temporary&) = delete;

  void* data() const { return data_; }

 private:
  void* data_;
};

// Throws std::bad_alloc for a thread that could not get its buffer: exceptions cannot leave a parallel region.
[[noreturn]] void scratch_failed();

}  // namespace mnist_ext
