// Enough of CUDA to run this project's kernels on a CPU, thread by thread, so that a mistake in their logic is found
// without a GPU. A kernel is ordinary C++ here; each of its threads is a fiber, which runs until it waits for others.
//
// Modelled: grids of blocks; dynamic shared memory, its own for each block, filled with 0xff at first and followed by a
// guard that must not change; __syncthreads, __syncwarp, shuffles of a whole warp; atomicAdd; __trap, which becomes a
// C++ exception; launch limits; alignment, where a kernel goes through load_vector and store_vector; cp.async, whose
// target holds 0xff from the start of the copy until its thread has waited for it, whoever reads it. Blocks, and
// threads between two waits, run in a shuffled order (`emulator::seed`). Some warps are held for a while, and at times
// one warp runs only where nobody else can: then the others are as far ahead of it as barriers let them. Where a
// barrier is missing the results change with the seed, and the tests run several.
//
// Not modelled: real concurrency (a fiber is never interrupted between two waits), memory ordering and caches (a
// missing fence goes unnoticed), divergence within a warp, shuffles of parts of a warp, bank conflicts, accesses beyond
// global memory, streams that overlap, and speed. Graphs are in graph_emulator.h, tensor cores in tensor_cores.h, and
// what only Hopper has in hopper.h.
#pragma once

#include <math.h>  // the overloads for float, in the global namespace
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned size = 1) : x(size) {}
};

struct uint4 {
  unsigned x, y, z, w;
};

namespace emulator {

inline constexpr int kWarpSize = 32;
inline constexpr int64_t kGuardBytes = 64, kMostSharedBytes = 227 << 10;
inline constexpr unsigned char kFill = 0xff, kGuard = 0xa5;
inline constexpr int64_t kStackBytes = 64 << 10;

inline unsigned seed = 0;                 // of the order in which threads and blocks run
inline int compute_capability_major = 9;  // of the device that is played
inline int multiprocessors = 132;         // likewise
inline int launches = 0;                  // so far

struct Block;

struct Barrier {
  int arrived = 0, members = 0;
  unsigned round = 0;
};

struct Warp : Barrier {
  bool held = false;                      // for a while, so that others run ahead
  bool last = false;                      // runs only where no other warp can
  unsigned char values[2][kWarpSize][8];  // shuffled; two rounds, as the slower lanes may still read the last one
};

// By cp.async.
struct Copy {
  void* shared;
  const void* global;
  int bytes, valid_bytes;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  unsigned index = 0;
  Block* block = nullptr;
  Warp* warp = nullptr;
  const unsigned* waiting_for = nullptr;  // a barrier's round, which must differ from...
  unsigned waiting_in = 0;
  bool done = false;
  std::vector<Copy> started;             // and not in a group yet
  std::deque<std::vector<Copy>> groups;  // not waited for yet, the oldest first

  bool can_run() const { return !done && (waiting_for == nullptr || *waiting_for != waiting_in); }
};

struct Block {
  unsigned index = 0;  // in the grid
  std::vector<char> shared;
  int64_t shared_bytes = 0;
  char* shared_begin = nullptr;
  Barrier barrier;
  std::vector<Warp> warps;
};

// What runs at this moment.
struct State {
  unsigned blocks_of_grid = 0, threads = 0;  // of a block
  Thread* thread = nullptr;
  ucontext_t scheduler;
  std::function<void()> kernel;
  std::vector<std::function<void()>> background;  // what copies and the like have yet to do, in any order
  std::mt19937 random;
  std::exception_ptr error;
};
inline State now;

inline void wait(const unsigned& round) {
  Thread& thread = *now.thread;
  thread.waiting_for = &round;
  thread.waiting_in = round;
  swapcontext(&thread.context, &now.scheduler);
}

// Lets those that wait go on when their turn comes, if all are there.
inline bool ends_round(Barrier& barrier) {
  if (barrier.arrived < barrier.members) return false;
  barrier.arrived = 0;
  ++barrier.round;
  return true;
}

inline void arrive_and_wait(Barrier& barrier) {
  ++barrier.arrived;
  if (!ends_round(barrier)) wait(barrier.round);
}

inline char* shared_memory() { return now.thread->block->shared_begin; }

inline void check_aligned(const void* place, int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(place) % static_cast<uintptr_t>(bytes) == 0) return;
  throw std::logic_error("emulator: an access of " + std::to_string(bytes) + " bytes that is not aligned to them");
}

inline void start_copy(void* shared, const void* global, int bytes, int valid_bytes) {
  const char* begin = static_cast<char*>(shared);
  const Block& block = *now.thread->block;
  if (begin < block.shared_begin || begin + bytes > block.shared_begin + block.shared_bytes) {
    throw std::logic_error("emulator: a copy to beyond shared memory");
  }
  if (valid_bytes < 0 || valid_bytes > bytes) throw std::logic_error("emulator: a copy of impossible size");
  check_aligned(shared, bytes);
  if (valid_bytes > 0) check_aligned(global, bytes);
  memset(shared, kFill, static_cast<size_t>(bytes));
  now.thread->started.push_back({shared, global, bytes, valid_bytes});
}

inline void commit_copies() { now.thread->groups.push_back(std::exchange(now.thread->started, {})); }

inline void wait_for_copies(size_t groups) {
  for (auto& waiting = now.thread->groups; waiting.size() > groups; waiting.pop_front()) {
    for (const Copy& copy : waiting.front()) {
      memset(copy.shared, 0, static_cast<size_t>(copy.bytes));
      if (copy.valid_bytes > 0) memcpy(copy.shared, copy.global, static_cast<size_t>(copy.valid_bytes));
    }
  }
}

inline void run_thread() {
  try {
    now.kernel();
  } catch (...) {
    if (!now.error) now.error = std::current_exception();
  }
  now.thread->done = true;
  swapcontext(&now.thread->context, &now.scheduler);
}

// A thread that returns no longer takes part in barriers, as on the device.
inline void leave(Thread& thread) {
  for (Barrier* barrier : {&thread.block->barrier, static_cast<Barrier*>(thread.warp)}) {
    if (--barrier->members > 0) ends_round(*barrier);
  }
}

inline void run_in_background() {
  const auto work = std::move(now.background.back());
  now.background.pop_back();
  try {
    work();
  } catch (...) {
    if (!now.error) now.error = std::current_exception();
  }
}

inline void check_guard(const Block& block) {
  const char* guard = block.shared_begin + block.shared_bytes;
  for (int64_t i = 0; i < kGuardBytes; ++i) {
    if (static_cast<unsigned char>(guard[i]) != kGuard) {
      throw std::logic_error("emulator: a kernel wrote beyond its " + std::to_string(block.shared_bytes) +
                             " bytes of shared memory");
    }
  }
}

inline std::unique_ptr<char[]> take_stack(std::vector<std::unique_ptr<char[]>>& pool) {
  if (pool.empty()) return std::make_unique_for_overwrite<char[]>(kStackBytes);
  auto stack = std::move(pool.back());
  pool.pop_back();
  return stack;
}

// Chooses who is last from now on: nobody, or a warp.
inline void choose_last(std::vector<Warp>& warps, std::mt19937& random) {
  for (Warp& warp : warps) warp.last = false;
  if (random() % 2) warps[random() % warps.size()].last = true;
}

// Lets each thread run that can, of those that are last or of the others. Returns whether there was one.
inline bool run_turns(const std::vector<Thread*>& order, bool last) {
  bool moved = false;
  for (Thread* thread : order) {
    if (thread->warp->last != last || !thread->can_run()) continue;
    moved = true;
    if (thread->warp->held) continue;  // its turn will come
    thread->waiting_for = nullptr;
    now.thread = thread;
    swapcontext(&now.scheduler, &thread->context);
    if (thread->done) leave(*thread);
    if (now.error) break;
  }
  return moved;
}

inline void run_block(unsigned index, int64_t shared_bytes) {
  std::mt19937& random = now.random;
  static std::vector<std::unique_ptr<char[]>> stacks;
  const unsigned threads = now.threads;
  Block block;
  std::vector<Thread> all(threads);
  block.index = index;
  block.shared_bytes = shared_bytes;
  block.shared.assign(static_cast<size_t>(shared_bytes + kGuardBytes + 16), static_cast<char>(kFill));
  block.shared_begin = block.shared.data() + (16 - reinterpret_cast<uintptr_t>(block.shared.data()) % 16) % 16;
  memset(block.shared_begin + shared_bytes, kGuard, kGuardBytes);
  block.barrier.members = static_cast<int>(threads);
  block.warps.resize((threads + kWarpSize - 1) / kWarpSize);
  for (unsigned i = 0; i < threads; ++i) {
    Thread& thread = all[i];
    thread.index = i;
    thread.block = &block;
    thread.warp = &block.warps[i / kWarpSize];
    ++thread.warp->members;
    thread.stack = take_stack(stacks);
    getcontext(&thread.context);
    thread.context.uc_stack = {.ss_sp = thread.stack.get(), .ss_flags = 0, .ss_size = kStackBytes};
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
  }
  std::vector<Thread*> order;
  for (Thread& thread : all) order.push_back(&thread);
  choose_last(block.warps, random);
  while (!order.empty() && !now.error) {
    std::shuffle(order.begin(), order.end(), random);
    for (Warp& warp : block.warps) {
      if (random() % 8 == 0) warp.held = !warp.held;
    }
    constexpr unsigned kRounds = 256;  // between two changes, on average
    if (random() % kRounds == 0) choose_last(block.warps, random);
    bool moved = false;
    std::shuffle(now.background.begin(), now.background.end(), random);
    while (!now.background.empty() && random() % 4 != 0) {
      moved = true;
      run_in_background();
    }
    moved = run_turns(order, false) || moved;
    if (!moved && !now.error) moved = run_turns(order, true);
    if (!moved && !now.background.empty()) {
      run_in_background();
    } else if (!moved) {
      now.error = std::make_exception_ptr(std::logic_error("emulator: a barrier is not reached by all threads"));
    }
    std::erase_if(order, [](const Thread* thread) { return thread->done; });
  }
  now.thread = nullptr;
  if (!now.error && !now.background.empty()) {
    now.error = std::make_exception_ptr(std::logic_error("emulator: a block ended before its asynchronous copies"));
  }
  now.background.clear();
  for (Thread& thread : all) stacks.push_back(std::move(thread.stack));
  if (now.error) std::rethrow_exception(std::exchange(now.error, nullptr));
  check_guard(block);
}

inline void run_grid(dim3 grid, dim3 block, int64_t shared_bytes, std::function<void()> kernel) {
  if (block.x == 0 || block.x > 1024 || grid.x == 0 || shared_bytes > kMostSharedBytes) {
    throw std::logic_error("emulator: a launch that no device can do");
  }
  ++launches;
  now.blocks_of_grid = grid.x;
  now.threads = block.x;
  now.kernel = std::move(kernel);
  now.random.seed(seed);
  std::vector<unsigned> blocks(grid.x);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), now.random);
  for (unsigned index : blocks) run_block(index, shared_bytes);
}

}  // namespace emulator

// The device's side.

struct SpecialRegister {
  unsigned (*read)();
  operator unsigned() const { return read(); }
};
struct SpecialRegisters {
  SpecialRegister x;
};
inline constexpr SpecialRegisters threadIdx{{[] { return emulator::now.thread->index; }}};
inline constexpr SpecialRegisters blockIdx{{[] { return emulator::now.thread->block->index; }}};
inline constexpr SpecialRegisters blockDim{{[] { return emulator::now.threads; }}};
inline constexpr SpecialRegisters gridDim{{[] { return emulator::now.blocks_of_grid; }}};

inline void __syncthreads() { emulator::arrive_and_wait(emulator::now.thread->block->barrier); }
inline void __syncwarp() { emulator::arrive_and_wait(*emulator::now.thread->warp); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  emulator::Warp& warp = *emulator::now.thread->warp;
  const unsigned lane = threadIdx.x % emulator::kWarpSize, side = warp.round % 2;
  memcpy(warp.values[side][lane], &value, sizeof value);
  emulator::arrive_and_wait(warp);
  memcpy(&value, warp.values[side][lane ^ static_cast<unsigned>(lanes)], sizeof value);
  return value;
}

inline unsigned atomicAdd(unsigned* place, unsigned value) { return std::exchange(*place, *place + value); }

template <class T>
T __ldcg(const T* place) {
  return *place;
}

[[noreturn]] inline void __trap() { throw std::out_of_range("emulator: __trap"); }

// The host's side.

enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation, cudaErrorStreamCaptureUnsupported };

#include "graph_emulator.h"

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMultiProcessorCount };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const bool major = attribute == cudaDevAttrComputeCapabilityMajor;
  *value = major ? emulator::compute_capability_major : emulator::multiprocessors;
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaMemsetAsync(void* place, int value, size_t bytes, cudaStream_t stream) {
  emulator::start(stream, [=] { memset(place, value, bytes); });
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... parameters) {
  if (emulator::captured_launches_fail && emulator::is_captured(config->stream)) return cudaErrorMemoryAllocation;
  emulator::start(config->stream, [=, launch = *config] {
    emulator::run_grid(launch.gridDim, launch.blockDim, static_cast<int64_t>(launch.dynamicSmemBytes),
                       [=] { kernel(parameters...); });
  });
  return cudaSuccess;
}
