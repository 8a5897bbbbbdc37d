// Bulk copies and the barriers that count their bytes, on the emulator. A copy's target holds 0xff from its start until
// a thread waits for the round; only then the bytes come.
#pragma once

#include <cuda_emulator.h>

#include <map>

namespace emulator {

struct BulkCopy {
  void* shared;
  const void* global;
  unsigned bytes;
};

struct CopyBarrierState {
  unsigned rounds = 0;  // complete, and their bytes there
  bool expecting = false;
  unsigned expected_bytes = 0, started_bytes = 0;
  unsigned news = 0;  // counts what a waiting thread should look at
  std::vector<BulkCopy> copies;

  bool can_complete() const { return expecting && started_bytes == expected_bytes; }
};

inline std::map<const void*, CopyBarrierState> copy_barriers;  // by their place in shared memory

inline constexpr uint64_t kCopyBarrier = 0x62617272696572;  // what lies in its place in shared memory

inline CopyBarrierState& copy_barrier(const void* place) {
  const auto found = copy_barriers.find(place);
  if (found == copy_barriers.end()) throw std::logic_error("emulator: a barrier of copies that was not initialized");
  if (memcmp(place, &kCopyBarrier, sizeof kCopyBarrier) != 0) {
    throw std::logic_error("emulator: a barrier of copies that was overwritten");
  }
  return found->second;
}

inline void init_copy_barrier(void* place) {
  copy_barriers[place] = {};
  memcpy(place, &kCopyBarrier, sizeof kCopyBarrier);
}

inline void expect_copies(const void* place, unsigned bytes) {
  CopyBarrierState& barrier = copy_barrier(place);
  if (barrier.expecting) throw std::logic_error("emulator: a round of copies begins before the last one is complete");
  barrier.expecting = true;
  barrier.expected_bytes = bytes;
  ++barrier.news;
}

inline void start_bulk_copy(void* shared, const void* global, unsigned bytes, const void* place) {
  CopyBarrierState& barrier = copy_barrier(place);
  check_aligned(shared, 16);
  check_aligned(global, 16);
  const Block& block = *now.thread->block;
  const char* begin = static_cast<char*>(shared);
  if (bytes % 16 != 0) throw std::logic_error("emulator: a bulk copy whose size is no multiple of 16 bytes");
  if (begin < block.shared_begin || begin + bytes > block.shared_begin + block.shared_bytes) {
    throw std::logic_error("emulator: a copy to beyond shared memory");
  }
  memset(shared, kFill, bytes);
  barrier.copies.push_back({shared, global, bytes});
  barrier.started_bytes += bytes;
  ++barrier.news;
}

// As on the device, only the last round and the one before can be told apart.
inline void wait_for_round(const void* place, unsigned round) {
  CopyBarrierState& barrier = copy_barrier(place);
  while (barrier.rounds % 2 == round % 2) {
    if (!barrier.can_complete()) {
      wait(barrier.news);
      continue;
    }
    for (const BulkCopy& copy : barrier.copies) memcpy(copy.shared, copy.global, copy.bytes);
    const unsigned rounds = barrier.rounds + 1, news = barrier.news + 1;
    barrier = {};
    barrier.rounds = rounds;
    barrier.news = news;
  }
}

}  // namespace emulator
