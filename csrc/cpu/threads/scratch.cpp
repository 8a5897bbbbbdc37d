#include "scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace mnist_ext {
namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Buffer {
  std::unique_ptr<void, Free> memory;
  std::size_t bytes = 0;
};

std::size_t rounded_up(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

void* allocate(std::size_t bytes) {
  void* memory = std::aligned_alloc(64, rounded_up(bytes));
  if (!memory) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* scratch(Scratch slot, std::size_t bytes) {
  thread_local Buffer buffers[static_cast<int>(Scratch::count)];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.bytes < bytes) {
    buffer.memory.reset();
    buffer.bytes = 0;
    buffer.memory.reset(allocate(bytes));
    buffer.bytes = rounded_up(bytes);
  }
  return buffer.memory.get();
}

Temporary::Temporary(std::size_t bytes) : data_(bytes > 0 ? allocate(bytes) : nullptr) {}

Temporary::~Temporary() { std::free(data_); }

void scratch_failed() { throw std::bad_alloc(); }

}  // namespace mnist_ext
