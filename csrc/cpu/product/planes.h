// Floats as sums of bfloat16, for the tiles of amx.h: x = x0 + x1 + x2, each the next 8 bits, rounded to nearest, so
// that the sum is x. A product of floats is the sum of the products of their planes, of which those of the lowest
// order, below 2^-26 of the whole, are left out. (Henry, Tang and Heinecke, Leveraging the bfloat16 artificial
// intelligence datatype for higher-precision computations, 2019.)
//
// Packed: for each 16 rows of A, or columns of B, each 32 steps of K: a tile for each plane. The pairs along K that a
// tile holds are k and k + 16, of A and of B, so that no number changes its lane on the way.
#pragma once

#include "../simd/amx.h"
#include "pack.h"

namespace mnist_ext::MNIST_EXT_ISA {

inline constexpr int kPlanes = 3;

// Of 16 rows or columns.
inline constexpr int64_t packed_bytes(int64_t steps_of_k) {
  return (steps_of_k + kAmxK - 1) / kAmxK * kPlanes * kAmxBytes;
}

#if defined(MNIST_EXT_AMX)

using FloatBits = Vec<float>::RawBits;

MNIST_EXT_INLINE FloatBits larger(FloatBits a, FloatBits b) { return a > b ? a : b; }

// Sizes of an operand's numbers, as the bits of floats, which are ordered like these.
struct Magnitudes {
  int32_t largest = 0;
  int32_t smallest_row = 0x7f000000;  // the least of the rows' largest ones, but for rows of 0

  void add(FloatBits of_rows) {
    for (int i = 0; i < kAmxRows; ++i) {
      if (of_rows[i] > largest) largest = of_rows[i];
      if (of_rows[i] != 0 && of_rows[i] < smallest_row) smallest_row = of_rows[i];
    }
  }
};

// Whether a product by tiles is as exact as in float32: no number is inf or NaN, nor does one become so in a plane or
// in a sum, and what counts as 0 because it is subnormal is below the last bit of the largest product in its row of C.
inline bool tiles_are_exact(const Magnitudes& a, const Magnitudes& b) {
  const auto exponent = [](int32_t bits) { return (bits >> 23) - 127; };
  return exponent(a.largest) < 127 && exponent(b.largest) < 127 && exponent(a.largest) + exponent(b.largest) < 100 &&
         exponent(a.smallest_row) + exponent(b.smallest_row) > -90;
}

// The planes of 16 pairs, to `to` and each kAmxBytes behind it. Returns the larger magnitude of each pair.
MNIST_EXT_INLINE FloatBits store_planes(Vec<float> first, Vec<float> second, char* to) {
  const auto magnitude = [](Vec<float> v) { return same_bits<FloatBits>(v.raw) & 0x7fffffff; };
  const FloatBits magnitudes = larger(magnitude(first), magnitude(second));
#pragma GCC unroll 3
  for (int plane = 0; plane < kPlanes; ++plane) {
    const auto rounded = [](Vec<float> v) { return (same_bits<Words>(v.raw) + 0x8000u) & 0xffff0000u; };
    const Words of_first = rounded(first), of_second = rounded(second);
    const Words pairs = of_first >> 16 | of_second;
    std::memcpy(to + plane * kAmxBytes, &pairs, sizeof(pairs));
    first = first - Vec<float>{same_bits<Vec<float>::Raw>(of_first)};
    second = second - Vec<float>{same_bits<Vec<float>::Raw>(of_second)};
  }
  return magnitudes;
}

// Where 16 numbers lie that are contiguous in memory. Either size may be 0 or less: they are then 0.
struct Line {
  int64_t line, lines;    // its index, and how many there are from there on
  int64_t begin, length;  // along it
};

MNIST_EXT_INLINE Vec<float> load_line(const float* data, int64_t stride, const Line& at) {
  if (at.lines <= 0 || at.length <= 0) return Vec<float>{};
  return load(data + at.line * stride + at.begin, at.length < kAmxRows ? static_cast<int>(at.length) : kAmxRows);
}

// The largest number of each of 16 rows, given as vectors.
MNIST_EXT_INLINE FloatBits largest_of_rows(const FloatBits (&rows)[kAmxRows]) {
  Vec<float> lanes[kAmxRows];
  for (int i = 0; i < kAmxRows; ++i) lanes[i] = {same_bits<Vec<float>::Raw>(rows[i])};
  transpose(lanes);
  FloatBits largest{};
  for (const Vec<float>& lane : lanes) largest = larger(largest, same_bits<FloatBits>(lane.raw));
  return largest;
}

enum class Side { a, b };

// Those rows of A or columns of B, behind their mask, by those steps of K.
template <Side side>
void pack_planes(const Operand<float>& operand, const Operand<float>& mask, Range outer, Range k, char* packed,
                 Magnitudes& magnitudes) {
  const bool along_k = operand.k_stride == 1 && operand.outer_stride != 1;
  const auto stride = [&](const Operand<float>& o) { return along_k ? o.outer_stride : o.k_stride; };
  for (int64_t tile = outer.begin; tile < outer.end; tile += kAmxRows) {
    FloatBits largest[kAmxRows] = {};
    for (int64_t p = k.begin; p < k.end; p += kAmxK, packed += kPlanes * kAmxBytes) {
      const auto line = [&](int i, int64_t first) __attribute__((always_inline)) {
        const Line at = along_k ? Line{tile + i, outer.end - tile - i, first, k.end - first}
                                : Line{first + i, k.end - first - i, tile, outer.end - tile};
        const Vec<float> numbers = load_line(operand.data, stride(operand), at);
        return mask.data ? where_positive(load_line(mask.data, stride(mask), at), numbers) : numbers;
      };
      const auto store = [&](int i, Vec<float> first, Vec<float> second) __attribute__((always_inline)) {
        largest[i] = larger(largest[i], store_planes(first, second, packed + i * (kAmxBytes / kAmxRows)));
      };
      if (along_k == (side == Side::a)) {  // as the tile lies
#pragma GCC unroll 4
        for (int i = 0; i < kAmxRows; ++i) store(i, line(i, p), line(i, p + kAmxRows));
        continue;
      }
      Vec<float> first[kAmxRows], second[kAmxRows];
#pragma GCC unroll 16
      for (int i = 0; i < kAmxRows; ++i) first[i] = line(i, p);
      transpose(first);
#pragma GCC unroll 16
      for (int i = 0; i < kAmxRows; ++i) second[i] = line(i, p + kAmxRows);
      transpose(second);
#pragma GCC unroll 4
      for (int i = 0; i < kAmxRows; ++i) store(i, first[i], second[i]);
    }
    FloatBits of_columns{};
    for (const FloatBits& bits : largest) of_columns = larger(of_columns, bits);
    magnitudes.add(side == Side::a ? largest_of_rows(largest) : of_columns);
  }
}

#endif

}  // namespace mnist_ext::MNIST_EXT_ISA
