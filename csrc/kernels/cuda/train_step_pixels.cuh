// The two products of the first layer with images of bytes, by tensor cores, as a warp makes its part of them.
//
// A pixel p stands for p * scale + shift. What is multiplied is p - center, a whole number of at most 8 bits, which
// TF32 holds exactly; scale, and the rest of the shift, are applied to the sums:
//
//   sum((p * scale + shift) * w) = scale * sum((p - center) * w) + (shift + center * scale) * sum(w)
//
// center is the pixel nearest to the one that stands for 0. So the numbers that are multiplied are, but for their unit,
// as large as those that they stand for, and no digits cancel between the two terms.
//
// A weight or gradient is multiplied as the sum of two numbers of TF32: these have 23 of its 24 bits. One that is
// infinite, or NaN, makes NaN of the sums that it is in.
#pragma once

#include "tensor_cores.cuh"

namespace mnist_ext::cuda {

struct PixelNumbers {
  float center;        // a whole number, 0 to 255
  float scale, shift;  // of p - center
};

inline PixelNumbers pixel_numbers(double scale, double shift) {
  const double zero = -shift / scale;
  const double center = zero > 0 ? (zero < 255 ? std::round(zero) : 255) : 0;
  return {static_cast<float>(center), static_cast<float>(scale), static_cast<float>(shift + center * scale)};
}

inline constexpr int kQuad = 4;  // pixels in a word; numbers in 16 bytes

// p - center of neighbouring pixels.
struct CenteredPixels {
  uint32_t at[kQuad];  // bits of floats
};

__device__ inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

__device__ inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline constexpr float kWhole = 1 << 23;  // the last of its bits counts 1

// kWhole + byte i of the word: the byte takes the place of the last bits.
__device__ inline float above_whole(uint32_t word, int i) {
  return float_of(__byte_perm(word, bits_of(kWhole), 0x7440 + static_cast<unsigned>(i)));
}

__device__ inline CenteredPixels centered_pixels(const uint8_t* pixels, float center) {
  const uint32_t word = load_vector<uint32_t>(pixels);
  CenteredPixels numbers;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) numbers.at[i] = bits_of(above_whole(word, i) - (kWhole + center));
  return numbers;
}

struct TwoParts {
  uint32_t high, low;  // TF32
};

// The high part is the nearest TF32; what is left has one bit more than TF32 at most, which is cut off. Of a NaN that
// rounding turns into something else, the low part is still NaN.
__device__ inline TwoParts two_parts(float x) {
  constexpr uint32_t kKept = 0xffffe000;
  const uint32_t high = (bits_of(x) + 0x1000) & kKept;
  return {high, bits_of(x - float_of(high)) & kKept};
}

// Sums of products with 8 rows of numbers, as tensor cores leave them: lane 4 r + c has those of rows r (0, 1) and
// r + 8 (2, 3) with columns 2 c (0, 2) and 2 c + 1 (1, 3).
struct TensorSums {
  float at[4] = {};
};

// What the center is taken from: the sum of each column.
__device__ inline void add_ones(TensorSums& sums, const TwoParts& b0, const TwoParts& b1) {
  const uint32_t one = bits_of(1.0f), ones[4] = {one, one, one, one};
  mma<float>(sums.at, ones, b0.low, b1.low);
  mma<float>(sums.at, ones, b0.high, b1.high);
}

// Sums of pixels themselves, from those of p - center and of ones.
__device__ inline TensorSums of_pixels(const TensorSums& sums, const TensorSums& of_ones, const PixelNumbers& numbers) {
  TensorSums result;
#pragma unroll
  for (int i = 0; i < 4; ++i) result.at[i] = fmaf(sums.at[i], numbers.scale, of_ones.at[i] * numbers.shift);
  return result;
}

// images [rows, pitch], of which kTiles * 16 rows at most are multiplied, with w [w_rows, w_pitch] of at most 8 rows
// and `quads` times 4 numbers: of these the part of one warp of `warps`. pitch is a multiple of 16. What is left for
// rows beyond the last one does not count.
template <int kTiles>
__device__ void pixels_times_weights(TensorSums (&sums)[kTiles], const uint8_t* images, int pitch, int rows,
                                     const float* w, int w_pitch, int w_rows, int quads, int warp, int warps,
                                     const PixelNumbers& numbers) {
  const int lane = threadIdx.x % kWarp, r = lane / 4, c = lane % 4;
  TensorSums of_ones;
  for (int first = 4 * warp; first < quads; first += 4 * warps) {
    const int quad = first + c;
    Pack<float, kQuad> of_w = {};
    if (quad < quads && r < w_rows) of_w = load_pack<float, kQuad>(w + r * w_pitch + kQuad * quad);
    TwoParts parts[kQuad];
#pragma unroll
    for (int i = 0; i < kQuad; ++i) parts[i] = two_parts(of_w.at[i]);
    CenteredPixels pixels[kTiles][2];
#pragma unroll
    for (int half = 0; half < 2 * kTiles; ++half) {
      const int row = 8 * half + r;
      pixels[half / 2][half % 2] =
          centered_pixels(images + (row < rows ? row : 0) * pitch + kQuad * quad, numbers.center);
    }
#pragma unroll
    for (int i = 0; i < kQuad; i += 2) {
      add_ones(of_ones, parts[i], parts[i + 1]);
      // The low parts of all tiles first: a product waits for the one before with the same sums.
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        const uint32_t b0 = high ? parts[i].high : parts[i].low, b1 = high ? parts[i + 1].high : parts[i + 1].low;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const CenteredPixels &upper = pixels[tile][0], &lower = pixels[tile][1];
          mma<float>(sums[tile].at, {upper.at[i], lower.at[i], upper.at[i + 1], lower.at[i + 1]}, b0, b1);
        }
      }
    }
  }
#pragma unroll
  for (TensorSums& of_tile : sums) of_tile = of_pixels(of_tile, of_ones, numbers);
}

inline constexpr int kUnitQuads = 8;  // of inputs, that a warp has the weight gradients of at once

// Products of pixels and gradients, summed over the rows, for the units unit, unit + stride, ... of 8 quads of inputs
// and at most 8 neurons: images [rows, pitch] of `quads` times 4 pixels, grads [rows, grads_pitch]. Lane 4 r + c gets,
// of each unit, quad r of inputs for neurons 2 c and 2 c + 1; what is beyond quads or neurons does not count.
template <int kUnits>
__device__ void pixels_times_gradients(float (&sums)[kUnits][2][kQuad], const uint8_t* images, int pitch, int rows,
                                       const float* grads, int grads_pitch, int neurons, int quads, int unit,
                                       int stride, const PixelNumbers& numbers) {
  const int lane = threadIdx.x % kWarp, r = lane / 4, c = lane % 4;
  TensorSums of_units[kUnits][2], of_ones;
  int place[kUnits];  // in an image
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int quad = (unit + u * stride) * kUnitQuads + r;
    place[u] = quad < quads ? kQuad * quad : 0;
  }
  for (int first = 0; first < rows; first += 8) {
    TwoParts parts[2];
    CenteredPixels pixels[kUnits][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first + 2 * c + i;
      parts[i] = two_parts(row < rows && r < neurons ? grads[row * grads_pitch + r] : 0);
      const uint8_t* image = images + (row < rows ? row : 0) * pitch;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) pixels[u][i] = centered_pixels(image + place[u], numbers.center);
    }
    add_ones(of_ones, parts[0], parts[1]);
    // The low parts of all first: a product waits for the one before with the same sums.
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      const uint32_t b0 = high ? parts[0].high : parts[0].low, b1 = high ? parts[1].high : parts[1].low;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const CenteredPixels &even = pixels[u][0], &odd = pixels[u][1];
        mma<float>(of_units[u][0].at, {even.at[0], even.at[1], odd.at[0], odd.at[1]}, b0, b1);
        mma<float>(of_units[u][1].at, {even.at[2], even.at[3], odd.at[2], odd.at[3]}, b0, b1);
      }
    }
  }
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const TensorSums of_pair = of_pixels(of_units[u][k], of_ones, numbers);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[u][i % 2][2 * k + i / 2] = of_pair.at[i];
    }
  }
}

}  // namespace mnist_ext::cuda
