// The matrix unit's instructions in plain C++, in place of the class of csrc/cpu/simd/amx.h: TDPBF16PS in volume 2 of
// Intel's Software Developer's Manual. Tiles that were neither zeroed nor loaded hold NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace mnist_ext::MNIST_EXT_ISA {

class AmxTiles {
 public:
  AmxTiles() { std::memset(tiles_, 0xff, sizeof(tiles_)); }

  template <int tile>
  void zero() {
    std::memset(tiles_[tile], 0, sizeof(tiles_[tile]));
  }

  template <int tile>
  void load(const void* p) {
    std::memcpy(tiles_[tile], p, sizeof(tiles_[tile]));
  }

  template <int tile>
  void store(float* p, int64_t ld) {
    for (int row = 0; row < 16; ++row) std::memcpy(p + row * ld, tiles_[tile][row], sizeof(tiles_[tile][row]));
  }

  template <int c, int a, int b>
  void multiply() {
    for (int row = 0; row < 16; ++row) {
      float even[16] = {}, odd[16] = {};
      for (int pair = 0; pair < 16; ++pair) {
        const uint32_t of_a = tiles_[a][row][pair];
        for (int column = 0; column < 16; ++column) {
          const uint32_t of_b = tiles_[b][pair][column];
          even[column] = flushed(std::fma(lower(of_a), lower(of_b), even[column]));
          odd[column] = flushed(std::fma(upper(of_a), upper(of_b), odd[column]));
        }
      }
      for (int column = 0; column < 16; ++column) {
        float sum;
        std::memcpy(&sum, &tiles_[c][row][column], sizeof(sum));
        sum = flushed(sum + flushed(even[column] + odd[column]));
        std::memcpy(&tiles_[c][row][column], &sum, sizeof(sum));
      }
    }
  }

 private:
  static float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

  static float upper(uint32_t pair) {
    pair &= 0xffff0000u;
    float x;
    std::memcpy(&x, &pair, sizeof(x));
    return flushed(x);
  }
  static float lower(uint32_t pair) { return upper(pair << 16); }

  uint32_t tiles_[8][16][16];  // pairs of bfloat16, or bits of float32
};

}  // namespace mnist_ext::MNIST_EXT_ISA
