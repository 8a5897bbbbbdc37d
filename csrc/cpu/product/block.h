// C = A * B (+ bias, ReLU), as gemm.h and dot_gemm.h compute it, and how they add up long sums.
#pragma once

#include "../linear.h"
#include "parallel.h"
#include "scratch.h"
#include "vec.h"

namespace mnist_ext::MNIST_EXT_ISA {

template <class T>
struct Product {
  int64_t rows, columns, depth;
  const T* a;                 // a(row, p) = a[row * a_row + p * a_depth]
  int64_t a_row, a_depth;     // one of them is 1
  const T* b;                 // b(p, column) = b[p * b_depth + column * b_column]
  int64_t b_depth, b_column;  // one of them is 1
  T* c;                       // c(row, column) = c[row * c_row + column]
  int64_t c_row;
  const T* bias = nullptr;  // [columns], added to every row; or
  bool one_bias = false;    // a single one; then there is one row
  bool relu = false;
  const T* a_gate = nullptr;  // a(row, p) counts as 0 where a_gate(row, p) <= 0; its strides are laid out as A's
  int64_t gate_row = 0, gate_depth = 0;

  // Whether A is read along its columns.
  bool a_is_transposed() const { return a_depth != 1 || (a_gate && gate_depth != 1); }

  bool packs_a() const { return a_gate || a_is_transposed(); }

  // Of a single column with c_row 1, without a gate.
  Product transposed() const {
    return {.rows = 1,
            .columns = rows,
            .depth = depth,
            .a = b,
            .a_row = b_column,
            .a_depth = b_depth,
            .b = a,
            .b_depth = a_depth,
            .b_column = a_row,
            .c = c,
            .c_row = rows,
            .bias = bias,
            .one_bias = true,
            .relu = relu};
  }

  // What the given steps of the summed dimension add to that part of C.
  Product part(Range of_rows, Range of_columns, Range of_depth) const {
    Product p = *this;
    p.rows = of_rows.size();
    p.columns = of_columns.size();
    p.depth = of_depth.size();
    p.a += of_rows.begin * a_row + of_depth.begin * a_depth;
    p.b += of_depth.begin * b_depth + of_columns.begin * b_column;
    p.c += of_rows.begin * c_row + of_columns.begin;
    if (bias && !one_bias) p.bias += of_columns.begin;
    if (a_gate) p.a_gate += of_rows.begin * gate_row + of_depth.begin * gate_depth;
    return p;
  }
};

// Steps of the summed dimension that are added up in registers, at most, before they are added to C.
inline constexpr int64_t kDepthBlock = 256;
// More steps than this are summed in pieces, of about as many blocks as there are pieces: in one chain, every block
// would round the sum so far.
inline constexpr int64_t kLongDepth = 32 * kDepthBlock;

inline int64_t depth_pieces(int64_t depth) {
  int64_t pieces = 1;
  while (depth > kLongDepth && pieces * pieces * kDepthBlock < depth) ++pieces;
  return pieces;
}

// Of a block of C, the sums of one piece.
inline constexpr int64_t kPieceRows = 384;
template <class T>
inline constexpr int64_t kPieceColumns = 2048 / sizeof(T);

template <class T>
T* piece_scratch() {
  return static_cast<T*>(scratch(Scratch::piece, kPieceRows * kPieceColumns<T> * sizeof(T)));
}

// c += the sums of a piece, and ReLU.
template <class T>
void add_piece(const Product<T>& piece, T* c, int64_t c_row, bool relu) {
  using V = Vec<T>;
  for (int64_t row = 0; row < piece.rows; ++row, c += c_row) {
    const T* from = piece.c + row * piece.c_row;
    for (int64_t i = 0; i < piece.columns; i += V::width) {
      const int lanes = piece.columns - i < V::width ? static_cast<int>(piece.columns - i) : V::width;
      V sum = V::load_partial(c + i, lanes) + V::load_partial(from + i, lanes);
      if (relu) sum = max(V{}, sum);  // NaN stays NaN
      sum.store_partial(c + i, lanes);
    }
  }
}

// That part of C by multiply(product), which adds block after block to C; long sums in pieces.
template <class T>
void multiply_in_pieces(const Product<T>& g, Range rows, Range columns, void (*multiply)(const Product<T>&)) {
  const int64_t pieces = depth_pieces(g.depth);
  if (pieces == 1) return multiply(g.part(rows, columns, {0, g.depth}));
  T* sums = piece_scratch<T>();
  const auto block = [](Range all, int64_t begin, int64_t size) {
    return Range{begin, all.end - begin < size ? all.end : begin + size};
  };
  for (int64_t row = rows.begin; row < rows.end; row += kPieceRows) {
    for (int64_t column = columns.begin; column < columns.end; column += kPieceColumns<T>) {
      const Range r = block(rows, row, kPieceRows), c = block(columns, column, kPieceColumns<T>);
      for (int64_t i = 0; i < pieces; ++i) {
        Product<T> piece = g.part(r, c, split(g.depth, kDepthBlock, i, pieces));
        piece.relu = false;
        if (i == 0) {
          multiply(piece);
          continue;
        }
        T* to = piece.c;
        piece.c = sums;
        piece.c_row = kPieceColumns<T>;
        piece.bias = nullptr;
        multiply(piece);
        add_piece(piece, to, g.c_row, g.relu && i + 1 == pieces);
      }
    }
  }
}

}  // namespace mnist_ext::MNIST_EXT_ISA
