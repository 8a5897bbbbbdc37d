// The matrix unit of a CPU (AMX): eight tiles of 16 rows of 64 bytes, and an instruction that multiplies two of them.
//
// TDPBF16PS in volume 2 of Intel's Software Developer's Manual. Tiles of bfloat16 hold pairs along K: A is
// [16 rows][16 pairs], B is [16 pairs][16 columns]. Products are added up in float32, rounded to nearest even;
// subnormal factors and sums count as 0.
#pragma once

#include <cstdint>

#include "vec.h"

namespace mnist_ext::MNIST_EXT_ISA {

inline constexpr bool kHasAmx =
#if defined(MNIST_EXT_AMX)
    true;
#else
    false;
#endif

inline constexpr int kAmxRows = 16;     // of a tile; columns of one of float32
inline constexpr int kAmxK = 32;        // steps of K that one instruction takes
inline constexpr int kAmxBytes = 1024;  // of a tile

#if defined(__AMX_BF16__)

// The calling thread's tiles, in use as long as this lives: others (oneDNN) configure them for themselves.
class AmxTiles {
 public:
  AmxTiles() {
    struct alignas(64) Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } configuration;
    for (int tile = 0; tile < 8; ++tile) {
      configuration.row_bytes[tile] = kAmxBytes / kAmxRows;
      configuration.rows[tile] = kAmxRows;
    }
    // (GCC 12's _tile_loadconfig lets the compiler leave out most of the stores above.)
    __asm__ volatile("ldtilecfg %0" : : "m"(configuration));
  }
  ~AmxTiles() { __asm__ volatile("tilerelease"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  template <int tile>
  MNIST_EXT_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
  }

  // From kAmxBytes at p; fastest if aligned to 64.
  template <int tile>
  MNIST_EXT_INLINE void load(const void* p) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(int64_t{64}), "i"(tile) : "memory");
  }

  template <int tile>
  MNIST_EXT_INLINE void store(float* p, int64_t ld) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(ld * 4), "i"(tile) : "memory");
  }

  // c += a * b
  template <int c, int a, int b>
  MNIST_EXT_INLINE void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }
};
#endif

}  // namespace mnist_ext::MNIST_EXT_ISA
