// mbarrier, tiled copies and wgmma of compute capability 9.0 on the emulator, from the text and the tables of the PTX
// ISA 9.0 and from nothing in the kernels.
//
// Modelled: phases of mbarriers, their counts of arrivals and bytes; copies of boxes with the 128-byte swizzle, with
// zeros beyond the matrix, which land at any time later and in any order; descriptors of wgmma along and across K with
// that swizzle; which lane holds what; wgmma-groups: a product is done at any time between its start and the wait for
// its group, in the shared memory and the registers of that moment, and until that wait the result holds NaN; that
// wgmma.fence stands between a wait and the next product; that the factors of TF32 products have been rounded.
// How a copy converts floats to TF32 is not documented: here to the nearest or towards 0, at random from copy to copy.
// Not modelled: whether warps of a warpgroup stay together (each warp's quarter is done by itself); fences between the
// generic and the asynchronous proxy; setmaxnreg; the precision of sums within one instruction (here: float64, rounded
// once).
#pragma once

#include <vector>

#include "tensor_cores.h"

namespace emulator {

// The shared window: dynamic shared memory begins at a multiple of 16 and of no more.
inline constexpr uint32_t kSharedBase = 0x410;

inline uint32_t shared_address(const void* place) {
  return kSharedBase + static_cast<uint32_t>(static_cast<const char*>(place) - now.thread->block->shared_begin);
}

inline char* shared_place(Block& block, uint32_t address, int64_t bytes) {
  const int64_t offset = static_cast<int64_t>(address) - kSharedBase;
  if (offset < 0 || offset + bytes > block.shared_bytes) {
    throw std::logic_error("emulator: an asynchronous access beyond shared memory");
  }
  return block.shared_begin + offset;
}

// 5.5.7, "Swizzling Modes": with 128B, bits 4 to 6 of an address are those of the place xor bits 7 to 9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// 9.7.13.15, "mbarrier".

struct MBarrier {
  int launch = 0;  // in which it was initialised
  unsigned arrivals = 0;
  unsigned pending = 0;
  int64_t bytes = 0;  // to come; may be negative for a while
  unsigned round = 0;
};

inline std::map<const void*, MBarrier> mbarriers;

inline MBarrier& mbarrier_at(const void* place) {
  MBarrier& barrier = mbarriers[place];
  if (barrier.launch != launches) throw std::logic_error("emulator: an mbarrier that has not been initialised");
  return barrier;
}

inline void mbarrier_init(uint64_t* place, unsigned arrivals) {
  check_aligned(place, 8);
  mbarriers[place] = {.launch = launches, .arrivals = arrivals, .pending = arrivals};
}

inline void end_phase_if_complete(MBarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  ++barrier.round;
}

inline void arrive(MBarrier& barrier) {
  if (barrier.pending == 0) throw std::logic_error("emulator: more arrivals at an mbarrier than it counts");
  --barrier.pending;
  end_phase_if_complete(barrier);
}

inline void mbarrier_arrive_expect_tx(uint64_t* place, unsigned bytes) {
  MBarrier& barrier = mbarrier_at(place);
  barrier.bytes += bytes;
  arrive(barrier);
}

inline void mbarrier_arrive(uint64_t* place) { arrive(mbarrier_at(place)); }

inline void mbarrier_wait(uint64_t* place, unsigned parity) {
  MBarrier& barrier = mbarrier_at(place);
  while (barrier.round % 2 == parity) wait(barrier.round);
}

// 9.7.9.27, "cp.async.bulk.tensor"; 5.5, "Tensors".

struct TensorMap {
  const void* data;
  int64_t row_size, rows, stride;  // the last in bytes
  int box_rows, element_bytes;
};

// NaN and infinity stay.
inline uint32_t converted_to_tf32(uint32_t bits, bool to_nearest) {
  const bool finite = (bits & 0x7f800000) != 0x7f800000;
  if (!finite) return bits;
  return (to_nearest ? bits + 0xfff + (bits >> 13 & 1) : bits) & 0xffffe000;
}

inline void start_box_copy(void* shared, const TensorMap& map, int column, int row, uint64_t* barrier) {
  constexpr int kRow = 128;
  if (reinterpret_cast<uintptr_t>(map.data) % 16 != 0 || map.stride % 16 != 0 || map.box_rows < 1 ||
      map.box_rows > 256 || map.row_size < 1 || map.rows < 1) {
    throw std::logic_error("emulator: an impossible tensor map");
  }
  const uint32_t to = shared_address(shared);
  if (to % 128 != 0) throw std::logic_error("emulator: a box that is not copied to a multiple of 128 bytes");
  Block* block = now.thread->block;
  const bool to_nearest = now.random() % 2;
  now.background.push_back([=] {
    const int bytes = map.element_bytes;
    for (int i = 0; i < map.box_rows; ++i) {
      for (int j = 0; j < kRow / bytes; ++j) {
        const int64_t r = int64_t{row} + i, c = int64_t{column} + j;
        uint32_t element = 0;
        if (r >= 0 && r < map.rows && c >= 0 && c < map.row_size) {
          memcpy(&element, static_cast<const char*>(map.data) + r * map.stride + c * bytes, static_cast<size_t>(bytes));
        }
        if (bytes == 4) element = converted_to_tf32(element, to_nearest);
        const uint32_t address = swizzled(to + static_cast<uint32_t>(i * kRow + j * bytes));
        memcpy(shared_place(*block, address, bytes), &element, static_cast<size_t>(bytes));
      }
    }
    MBarrier& there = mbarrier_at(barrier);
    there.bytes -= map.box_rows * kRow;
    end_phase_if_complete(there);
  });
}

// 9.7.15.5, "wgmma.mma_async".

// 9.7.15.5.1.2.2, "Matrix Descriptor Format".
struct Descriptor {
  uint32_t start, leading, stride;

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4) {
    const uint64_t base_offset = bits >> 49 & 7, swizzle = bits >> 62;
    if (swizzle != 1 || base_offset != 0) throw std::logic_error("emulator: only the 128-byte swizzle is modelled");
  }

  // 9.7.15.5.1.2.1, "Canonical Layouts" with 128B swizzling, of T elements in 16 bytes, in elements: along K
  // ((8, m), (T, 2k)) : ((8T, SBO), (1, T)), across it ((T, 8, m), (8, k)) : ((1, T, LBO), (8T, SBO)).
  uint32_t address(bool outer_major, uint32_t outer, uint32_t k, uint32_t element_bytes) const {
    const uint32_t in_row = 128 / element_bytes;
    const uint32_t unswizzled =
        outer_major ? outer % in_row * element_bytes + outer / in_row * leading + k % 8 * 128 + k / 8 * stride
                    : outer % 8 * 128 + outer / 8 * stride + k * element_bytes;
    return swizzled(start + unswizzled);
  }
};

struct Wgmma {
  Shares<float*> d;
  Shares<const uint32_t*> a_fragment;
  uint64_t a, b;
  int tiles, warp, element_bytes;
  bool add, b_outer_major, from_registers;
  unsigned group;
  Block* block;
  double (*element)(const uint32_t*, int);
  bool done = false;
};

struct WgmmaWarp {
  std::vector<Wgmma> started;  // in order; those that have been waited for are gone
  unsigned group = 0;
  bool fenced = false;
  std::map<float*, std::vector<float>> results;  // of those, where only the tensor cores see them

  // 9.7.15.5.1.1, "Register Fragments": of 16-bit elements a as for m16n8k16; d[i] of a lane in row group or group + 8
  // and column 8 (i / 4) + 2 in_group + i % 2 of the warp's 16 rows.
  void run(Wgmma& wgmma) {
    const bool half = wgmma.element_bytes == 2;
    const int N = 8 * wgmma.tiles, K = 32 / wgmma.element_bytes;
    std::vector<double> b(static_cast<size_t>(K * N));
    double a[16][16];
    // The instruction drops the lower 13 bits of TF32 factors: nobody shall leave the rounding to it.
    const auto element = [&](const uint32_t* words, int i) {
      if (!half && words[i] & 0x1fff) throw std::logic_error("emulator: a factor that has not been rounded to TF32");
      return wgmma.element(words, i);
    };
    const auto read = [&](const Descriptor& descriptor, bool outer_major, int outer, int k) {
      const uint32_t address = descriptor.address(outer_major, static_cast<uint32_t>(outer), static_cast<uint32_t>(k),
                                                  static_cast<uint32_t>(wgmma.element_bytes));
      uint32_t word = 0;
      memcpy(&word, shared_place(*wgmma.block, address, wgmma.element_bytes), static_cast<size_t>(wgmma.element_bytes));
      return element(&word, 0);
    };
    const Descriptor of_b(wgmma.b);
    for (int n = 0; n < N; ++n) {
      for (int k = 0; k < K; ++k) b[static_cast<size_t>(K * n + k)] = read(of_b, wgmma.b_outer_major, n, k);
    }
    if (wgmma.from_registers) {
      for (int lane = 0; lane < kWarpSize; ++lane) {
        for (int i = 0; i < 8; ++i) {
          const Place place = a_of_m16n8k16(lane / 4, lane % 4, i);
          a[place.row][place.column] = element(wgmma.a_fragment[static_cast<size_t>(lane)], i);
        }
      }
    } else {
      const Descriptor of_a(wgmma.a);
      for (int m = 0; m < 16; ++m) {
        for (int k = 0; k < K; ++k) a[m][k] = read(of_a, false, 16 * wgmma.warp + m, k);
      }
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      std::vector<float>& d = results.at(wgmma.d[static_cast<size_t>(lane)]);
      for (int i = 0; i < 4 * wgmma.tiles; ++i) {
        const Place place = c_of_m16n8(lane / 4, lane % 4, i % 4);
        const double* column = &b[static_cast<size_t>(K * (8 * (i / 4) + place.column))];
        double sum = wgmma.add ? d[static_cast<size_t>(i)] : 0;
        for (int k = 0; k < K; ++k) sum += a[place.row][k] * column[k];
        d[static_cast<size_t>(i)] = static_cast<float>(sum);
      }
    }
    wgmma.done = true;
  }

  // Those of groups before this one.
  void run_before(unsigned end) {
    for (Wgmma& wgmma : started) {
      if (!wgmma.done && wgmma.group < end) run(wgmma);
    }
  }
};

inline WgmmaWarp& wgmma_warp() {
  static std::map<const Warp*, std::pair<int, WgmmaWarp>> warps;
  auto& [launch, warp] = warps[now.thread->warp];
  if (launch != launches) warp = {}, launch = launches;
  return warp;
}

struct Nothing {};

inline void wgmma_fence() {
  collective("wgmma.fence", Nothing{}, [](auto&) { wgmma_warp().fenced = true; });
}

inline void wgmma_commit_group() {
  collective("wgmma.commit_group", Nothing{}, [](auto&) { ++wgmma_warp().group; });
}

inline void wgmma_wait_group(unsigned groups) {
  collective("wgmma.wait_group", Nothing{}, [=](auto&) {
    WgmmaWarp& warp = wgmma_warp();
    const unsigned end = warp.group < groups ? 0 : warp.group - groups;
    warp.run_before(end);
    std::erase_if(warp.started, [=](const Wgmma& wgmma) { return wgmma.group < end; });
    std::erase_if(warp.results, [&](auto& result) {
      for (const Wgmma& wgmma : warp.started) {
        if (std::find(wgmma.d.begin(), wgmma.d.end(), result.first) != wgmma.d.end()) return false;
      }
      std::copy(result.second.begin(), result.second.end(), result.first);
      return true;
    });
    warp.fenced = false;
  });
}

template <class T>
void wgmma(float* d, int tiles, const uint32_t* a_fragment, uint64_t a, uint64_t b, bool add, bool b_outer_major) {
  struct Share {
    float* d;
    const uint32_t* a_fragment;
    uint64_t a, b;
    bool add;
  };
  if (sizeof(T) == 4 && (b_outer_major || a_fragment)) throw std::logic_error("emulator: not modelled of TF32");
  collective("wgmma.mma_async", Share{d, a_fragment, a, b, add}, [=](Shares<Share>& shares) {
    WgmmaWarp& warp = wgmma_warp();
    if (!warp.fenced) throw std::logic_error("emulator: wgmma.mma_async without wgmma.fence");
    Wgmma wgmma{.a = a,
                .b = b,
                .tiles = tiles,
                .warp = static_cast<int>(now.thread->index / kWarpSize % 4),
                .element_bytes = sizeof(T),
                .add = add,
                .b_outer_major = b_outer_major,
                .from_registers = a_fragment != nullptr,
                .group = warp.group,
                .block = now.thread->block,
                .element = element_of<T>};
    for (size_t lane = 0; lane < kWarpSize; ++lane) {
      const Share& share = shares[lane];
      if (share.a != a || share.b != b || share.add != add) {
        throw std::logic_error("emulator: wgmma.mma_async with different operands in one warp");
      }
      wgmma.d[lane] = share.d;
      wgmma.a_fragment[lane] = share.a_fragment;
      const auto [result, is_new] = warp.results.try_emplace(share.d);
      if (is_new) result->second.assign(share.d, share.d + 4 * tiles);
      std::fill(share.d, share.d + 4 * tiles, std::numeric_limits<float>::quiet_NaN());
    }
    warp.started.push_back(wgmma);
    if (now.random() % 2) warp.run_before(warp.group + 1);
  });
}

template <class T>
void wgmma(float* d, int tiles, const uint32_t (&a_fragment)[4], uint64_t b, bool add, bool b_outer_major) {
  wgmma<T>(d, tiles, a_fragment, 0, b, add, b_outer_major);
}

template <class T>
void wgmma(float* d, int tiles, uint64_t a, uint64_t b, bool add, bool b_outer_major) {
  wgmma<T>(d, tiles, nullptr, a, b, add, b_outer_major);
}

}  // namespace emulator
