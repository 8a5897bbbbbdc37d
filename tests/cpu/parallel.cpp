// parallel_in_phases: where one thread cannot get its memory, no thread begins, however late that comes.
#include "../../csrc/cpu/threads/parallel.h"

#include <chrono>
#include <cstdio>
#include <new>
#include <thread>

int main() {
  using namespace mnist_ext::MNIST_EXT_ISA;
  constexpr int threads = 2;
  int begun = 0, reserved = 0;
  const auto body = [&](int, int, auto&) { __atomic_add_fetch(&begun, 1, __ATOMIC_RELAXED); };
  const auto reserve = [&](int, int) { __atomic_add_fetch(&reserved, 1, __ATOMIC_RELAXED); };
  parallel_in_phases(threads, reserve, body);
  if (reserved != threads || begun != threads) return std::puts("not each thread reserved and began"), 1;

  begun = 0;
  const auto fails_late = [](int thread, int) {
    if (thread != threads - 1) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    throw std::bad_alloc();
  };
  try {
    parallel_in_phases(threads, fails_late, body);
    return std::puts("no bad_alloc"), 1;
  } catch (const std::bad_alloc&) {
  }
  if (begun != 0) return std::puts("a thread began before another one failed"), 1;
}
