// ldmatrix and mma.sync on the emulator, from the tables of the PTX ISA 9.0 and from nothing in the kernels.
//
// Modelled: which lane holds which element; alignment; that all lanes of the warp run the same instruction; that the
// factors of TF32 products of mma have been rounded; bank conflicts of ldmatrix and of load_word, which are counted.
// Not modelled: the order and the precision of the sums within one instruction (here: float64, rounded once).
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>

#include "cuda_emulator.h"

namespace emulator {

inline int bank_conflicts = 0;  // so far

template <class Share>
using Shares = std::array<Share, kWarpSize>;

// Something that a warp does together: the last lane to come computes it from the shares of all, in place.
template <class Share, class Compute>
Share collective(const char* instruction, const Share& mine, Compute compute) {
  struct Round {
    const char* instruction;
    Shares<Share> shares;
  };
  static std::map<const Warp*, std::array<Round, 2>> of_warps;  // two rounds: the slower lanes still read the last one
  Warp& warp = *now.thread->warp;
  Round& round = of_warps[&warp][warp.round % 2];
  if (warp.arrived == 0) round.instruction = instruction;
  if (warp.members != kWarpSize || strcmp(round.instruction, instruction) != 0) {
    throw std::logic_error("emulator: " + std::string(instruction) + " by a part of a warp");
  }
  const unsigned lane = now.thread->index % kWarpSize;
  round.shares[lane] = mine;
  if (warp.arrived + 1 == warp.members) compute(round.shares);
  arrive_and_wait(warp);
  return round.shares[lane];
}

// 9.7.14.5.15, "ldmatrix": lanes 0-7 hold the addresses of the rows of the first matrix, 8-15 of the second, and so on.
// Of a row of 8 elements, lane 4 row + i gets elements 2 i and 2 i + 1; with .trans, of a column.
inline void ldmatrix(bool transposed, uint32_t (&part)[4], const void* row) {
  struct Share {
    const char* row;
    uint32_t part[4];
  };
  check_aligned(row, 16);
  const char* shared = now.thread->block->shared_begin;
  if (row < shared || static_cast<const char*>(row) + 16 > shared + now.thread->block->shared_bytes) {
    throw std::logic_error("emulator: ldmatrix from beyond shared memory");
  }
  const auto compute = [=](Shares<Share>& shares) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t element[8][8];
      unsigned banks = 0;
      for (int i = 0; i < 8; ++i) {
        const char* address = shares[static_cast<size_t>(8 * matrix + i)].row;
        memcpy(element[i], address, 16);
        const unsigned bank = 1u << ((address - shared) / 16 % 8);
        if (banks & bank) ++bank_conflicts;
        banks |= bank;
      }
      for (unsigned lane = 0; lane < kWarpSize; ++lane) {
        const unsigned r = lane / 4, c = lane % 4 * 2;
        const uint32_t low = transposed ? element[c][r] : element[r][c];
        const uint32_t high = transposed ? element[c + 1][r] : element[r][c + 1];
        shares[lane].part[matrix] = low | high << 16;
      }
    }
  };
  const Share mine = collective("ldmatrix", Share{static_cast<const char*>(row), {}}, compute);
  memcpy(part, mine.part, sizeof part);
}

// A word of shared memory for each lane of a warp: 32 banks, 4 bytes wide, give one word each at a time.
inline uint32_t load_word(const void* place) {
  check_aligned(place, 4);
  collective("load_word", static_cast<const char*>(place), [](Shares<const char*>& places) {
    std::array<const char*, 32> of_bank{};
    for (const char* p : places) {
      const char*& word = of_bank[static_cast<size_t>((p - now.thread->block->shared_begin) / 4 % 32)];
      if (word && word != p) ++bank_conflicts;
      word = p;
    }
  });
  uint32_t word;
  memcpy(&word, place, sizeof word);
  return word;
}

// 9.7.14.5.8, "Matrix Fragments for mma.m16n8k16 with floating point type", of .f16 and .bf16: element i of A, B and of
// C and D in a lane; `group` is lane / 4, `in_group` lane % 4.
struct Place {
  int row, column;
};
inline Place a_of_m16n8k16(int group, int in_group, int i) {
  const bool upper = (0 <= i && i < 2) || (4 <= i && i < 6);
  return {upper ? group : group + 8, i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8};
}
inline Place b_of_m16n8k16(int group, int in_group, int i) {
  return {i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8, group};
}
inline Place c_of_m16n8(int group, int in_group, int i) { return {i < 2 ? group : group + 8, in_group * 2 + (i & 1)}; }

// 9.7.14.5.6, "Matrix Fragments for mma.m16n8k8", of .tf32.
inline Place a_of_m16n8k8_tf32(int group, int in_group, int i) {
  return {i == 0 || i == 2 ? group : group + 8, i == 0 || i == 1 ? in_group : in_group + 4};
}
inline Place b_of_m16n8k8_tf32(int group, int in_group, int i) { return {i == 0 ? in_group : in_group + 4, group}; }

template <class T>
double element_of(const uint32_t* words, int i) {
  T element;
  memcpy(&element, reinterpret_cast<const char*>(words) + i * static_cast<int>(sizeof(T)), sizeof element);
  return mnist_ext::cuda::widen(element);
}

inline uint32_t rounded_to_tf32(uint32_t bits) {
  const bool finite = (bits & 0x7f800000) != 0x7f800000;
  return (finite ? bits + 0x1000 : bits) & 0xffffe000;
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Share {
    uint32_t a[4], b[2];
    float d[4];
  };
  constexpr bool kHalf = sizeof(T) == 2;
  constexpr int kK = kHalf ? 16 : 8;
  const auto compute = [](Shares<Share>& shares) {
    double a_matrix[16][kK], b_matrix[kK][8];
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const Share& share = shares[static_cast<size_t>(lane)];
      const int group = lane / 4, in_group = lane % 4;
      for (int i = 0; i < (kHalf ? 8 : 4); ++i) {
        const Place place = kHalf ? a_of_m16n8k16(group, in_group, i) : a_of_m16n8k8_tf32(group, in_group, i);
        a_matrix[place.row][place.column] = element_of<T>(share.a, i);
      }
      for (int i = 0; i < (kHalf ? 4 : 2); ++i) {
        const Place place = kHalf ? b_of_m16n8k16(group, in_group, i) : b_of_m16n8k8_tf32(group, in_group, i);
        b_matrix[place.row][place.column] = element_of<T>(share.b, i);
      }
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const Place place = c_of_m16n8(lane / 4, lane % 4, i);
        float& to = shares[static_cast<size_t>(lane)].d[i];
        double sum = to;
        for (int k = 0; k < kK; ++k) sum += a_matrix[place.row][k] * b_matrix[k][place.column];
        to = static_cast<float>(sum);
      }
    }
  };
  Share mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
  if (!kHalf) {
    for (uint32_t bits : {a[0], a[1], a[2], a[3], b0, b1}) {
      if (bits & 0x1fff) throw std::logic_error("emulator: a factor that has not been rounded to TF32");
    }
  }
  mine = collective("mma", mine, compute);
  memcpy(d, mine.d, sizeof d);
}

}  // namespace emulator
