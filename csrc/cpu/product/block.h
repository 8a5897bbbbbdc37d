// The part of a product that is computed at once, and how long sums are cut.
#pragma once

#include "../../api/product.h"
#include "../simd/elements.h"
#include "../threads/parallel.h"
#include "../threads/scratch.h"

namespace mnist_ext::MNIST_EXT_ISA {

// A product of which any part of C may be made, without what becomes of it. One stride of each operand is 1.
template <class T>
struct Block : Product<T> {
  int64_t ldc;            // leading dimension of C
  bool one_bias = false;  // of a single row: bias is one number, not one for each column

  explicit Block(const Product<T>& p) : Product<T>(p), ldc(p.N) {}

  // Whether A is read along its columns.
  bool a_is_transposed() const {
    return this->a.k_stride != 1 || (this->relu_mask.data && this->relu_mask.k_stride != 1);
  }

  bool packs_a() const { return this->relu_mask.data || a_is_transposed(); }

  // Of a single column with ldc 1, without a mask.
  Block transposed() const {
    Block t = *this;
    t.M = 1;
    t.N = t.ldc = this->M;
    t.a = this->b;
    t.b = this->a;
    t.one_bias = true;
    return t;
  }

  // What the given steps of K add to that part of C.
  Block part(Range of_m, Range of_n, Range of_k) const {
    Block p = *this;
    p.M = of_m.size();
    p.N = of_n.size();
    p.K = of_k.size();
    const auto move = [](Operand<T>& operand, int64_t outer, int64_t k) {
      operand.data += outer * operand.outer_stride + k * operand.k_stride;
    };
    move(p.a, of_m.begin, of_k.begin);
    move(p.b, of_n.begin, of_k.begin);
    if (p.relu_mask.data) move(p.relu_mask, of_m.begin, of_k.begin);
    p.c += of_m.begin * ldc + of_n.begin;
    if (p.bias && !one_bias) p.bias += of_n.begin;
    return p;
  }
};

// Steps of K that are added up in registers, at most, before they are added to C.
inline constexpr int64_t kBlockK = 256;
// More steps than this are summed in pieces, of about as many blocks as there are pieces: in one chain, every block
// would round the sum so far.
inline constexpr int64_t kLongK = 32 * kBlockK;

inline int64_t pieces_of(int64_t K) {
  int64_t pieces = 1;
  while (K > kLongK && pieces * pieces * kBlockK < K) ++pieces;
  return pieces;
}

// Of a block of C, the sums of one piece.
inline constexpr int64_t kPieceM = 384;
template <class T>
inline constexpr int64_t kPieceN = 2048 / sizeof(T);

template <class T>
T* piece_scratch() {
  return static_cast<T*>(scratch(Scratch::piece, kPieceM * kPieceN<T> * sizeof(T)));
}

// c += the sums of a piece, and ReLU.
template <class T>
void add_piece(const Block<T>& piece, T* c, int64_t ldc, bool relu) {
  for (int64_t row = 0; row < piece.M; ++row, c += ldc) {
    const T* from = piece.c + row * piece.ldc;
    for_each_vector<T>(piece.N, [&](int64_t i, int lanes) __attribute__((always_inline)) {
      Vec<T> sum = load(c + i, lanes) + load(from + i, lanes);
      if (relu) sum = max(Vec<T>{}, sum);  // NaN stays NaN
      store(c + i, sum, lanes);
    });
  }
}

// That part of C by multiply(block), which adds block after block to C; long sums in pieces.
template <class T>
void multiply_in_pieces(const Block<T>& g, Range rows, Range columns, void (*multiply)(const Block<T>&)) {
  const int64_t pieces = pieces_of(g.K);
  if (pieces == 1) return multiply(g.part(rows, columns, {0, g.K}));
  T* sums = piece_scratch<T>();
  const auto some = [](Range all, int64_t begin, int64_t size) {
    return Range{begin, all.end - begin < size ? all.end : begin + size};
  };
  for (int64_t row = rows.begin; row < rows.end; row += kPieceM) {
    for (int64_t column = columns.begin; column < columns.end; column += kPieceN<T>) {
      const Range r = some(rows, row, kPieceM), c = some(columns, column, kPieceN<T>);
      for (int64_t i = 0; i < pieces; ++i) {
        Block<T> piece = g.part(r, c, split(g.K, kBlockK, i, pieces));
        piece.relu = false;
        if (i == 0) {
          multiply(piece);
          continue;
        }
        T* to = piece.c;
        piece.c = sums;
        piece.ldc = kPieceN<T>;
        piece.bias = nullptr;
        piece.accumulate = false;
        multiply(piece);
        add_piece(piece, to, g.ldc, g.relu && i + 1 == pieces);
      }
    }
  }
}

}  // namespace mnist_ext::MNIST_EXT_ISA
