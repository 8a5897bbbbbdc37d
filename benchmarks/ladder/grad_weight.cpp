// The gradients of a linear layer's weight and bias, grad_weight = grad_output^T * input: from a triple loop to gemm.h.
// The sum runs over the batch, down the columns of both operands. Once for 1024x1024 by 1024, where caches matter, and
// once for 64x784 by 128, where all of it fits into the second-level cache.
//
//   dot_order          each element by itself: both operands are read with a stride
//   row_order          a row of the result at a time: all reads and writes run along rows, the compiler makes vectors
//   register_tile      6 rows by 4 vectors of the result stay in registers (6 by 2 where there are 16)
//   blocks             256 steps by 512 columns at a time: that part of the input is read again from the second-level
//                      cache
//   packed_input       and lies there in the order in which it is read
//   packed_grad_output the tile's part of grad_output too; the bias's gradient is added up on the way
//   threads            each its share of the rows
//   linear_backward    the kernel in use
//
//   python benchmarks/ladder/ladder.py grad_weight
//
// Rungs of vectors take a number of columns that is a multiple of the vector's width; the kernel in use takes any.
#include "../../csrc/cpu/executor.h"
#include "ladder.h"

namespace {

using namespace ladder;
using V = Vec<float>;

struct Problem {
  int64_t batch, in, out;
  const float *grad_output, *input;  // [batch, out], [batch, in]
  float *grad_weight, *grad_bias;    // [out, in], [out]
};

void store_bias(const Problem& x, const std::vector<double>& sums) {
  for (int64_t n = 0; n < x.out; ++n) x.grad_bias[n] = static_cast<float>(sums[n]);
}

// A pass of its own over grad_output, in all rungs up to the one that packs it.
void bias_pass(const Problem& x) {
  std::vector<double> sums(x.out);
  for (int64_t m = 0; m < x.batch; ++m) {
    for (int64_t n = 0; n < x.out; ++n) sums[n] += x.grad_output[m * x.out + n];
  }
  store_bias(x, sums);
}

void dot_order(const Problem& x) {
  for (int64_t n = 0; n < x.out; ++n) {
    for (int64_t k = 0; k < x.in; ++k) {
      float sum = 0;
      for (int64_t m = 0; m < x.batch; ++m) sum += x.grad_output[m * x.out + n] * x.input[m * x.in + k];
      x.grad_weight[n * x.in + k] = sum;
    }
  }
  bias_pass(x);
}

void row_order(const Problem& x) {
  for (int64_t n = 0; n < x.out; ++n) {
    float* row = x.grad_weight + n * x.in;
    std::fill_n(row, x.in, 0.0f);
    for (int64_t m = 0; m < x.batch; ++m) {
      const float dy = x.grad_output[m * x.out + n];
      for (int64_t k = 0; k < x.in; ++k) row[k] += dy * x.input[m * x.in + k];
    }
  }
  bias_pass(x);
}

// A tile of the result, over some steps of the batch.
struct OuterTile {
  const float* a;  // step p, row r: a[p * a_step + r]
  int64_t a_step;
  const float* b;  // step p, column k: b[p * b_step + k]
  int64_t b_step, steps;
  float* c;
  int64_t c_row;
  bool first;  // steps of the batch: what lies in c does not count
};

// Per step N loads and R broadcasts for R * N multiply-adds.
template <int R, int N>
void outer_tile(const OuterTile& t) {
  V sum[R][N] = {};
  const float *a = t.a, *b = t.b;
  for (int64_t p = 0; p < t.steps; ++p, a += t.a_step, b += t.b_step) {
    V bv[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) bv[v] = V::load(b + v * V::width);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V ar = V::broadcast(a[r]);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) sum[r][v] = fma(ar, bv[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
      float* c = t.c + r * t.c_row + v * V::width;
      (t.first ? sum[r][v] : sum[r][v] + V::load(c)).store(c);
    }
  }
}

// A tile of `rows` rows, at most R, by `vectors` vectors, at most N.
template <int R, int N>
void tile_of(const OuterTile& t, int64_t rows, int64_t vectors) {
  if constexpr (R > 1) {
    if (rows < R) return tile_of<R - 1, N>(t, rows, vectors);
  }
  if constexpr (N > 1) {
    if (vectors < N) return tile_of<R, N - 1>(t, rows, vectors);
  }
  outer_tile<R, N>(t);
}

struct Part {
  Range rows, columns, batch;
};

Part whole(const Problem& x) { return {{0, x.out}, {0, x.in}, {0, x.batch}}; }

constexpr int64_t kPanel = kTileColumns<float>;

// The part's input in panels as wide as a tile, each [batch][kPanel], one after the other: the tile reads contiguously.
const float* packed_input(const Problem& x, const Part& part) {
  float* packed = static_cast<float*>(scratch(Scratch::b_block, kBlockK * kColumnBlock<float> * sizeof(float)));
  float* to = packed;
  for (int64_t column = part.columns.begin; column < part.columns.end; column += kPanel) {
    const int64_t n = std::min(kPanel, part.columns.end - column);
    for (int64_t m = part.batch.begin; m < part.batch.end; ++m, to += kPanel) {
      std::memcpy(to, x.input + m * x.in + column, n * sizeof(float));
    }
  }
  return packed;
}

// The rows' part of grad_output, [batch][kTileRows]; whole vectors are stored, and the next step overwrites what was
// too much. Sums for the bias are in float over 32 steps, then in double.
const float* packed_grad_output(const Problem& x, Range rows, Range batch, double* sums) {
  constexpr int64_t chain = 32;
  constexpr int vectors = (kTileRows + V::width - 1) / V::width;
  float* packed = static_cast<float*>(scratch(Scratch::a_tiles, kBlockK * kTileRows * sizeof(float) + kVectorBytes));
  float* to = packed;
  for (int64_t begin = batch.begin; begin < batch.end; begin += chain) {
    V sum[vectors] = {};
    for (int64_t m = begin; m < std::min(begin + chain, batch.end); ++m, to += kTileRows) {
      for (int v = 0; v < vectors; ++v) {
        const int64_t lanes = std::min<int64_t>(rows.size() - v * V::width, V::width);
        if (lanes <= 0) break;
        const V dy = V::load_partial(x.grad_output + m * x.out + rows.begin + v * V::width, static_cast<int>(lanes));
        dy.store(to + v * V::width);
        sum[v] = sum[v] + dy;
      }
    }
    for (int64_t r = 0; sums && r < rows.size(); ++r) sums[rows.begin + r] += sum[r / V::width].raw[r % V::width];
  }
  return packed;
}

enum class Packing { none, input, both };

// All tiles of a part. sums: of grad_output's columns, to be added to while it is packed.
template <Packing packing>
void tiles(const Problem& x, const Part& part, double* sums = nullptr) {
  const float* input = x.input + part.batch.begin * x.in + part.columns.begin;
  int64_t step = x.in, panel = kPanel;  // from one step of the batch to the next, from one panel to the next
  if (packing != Packing::none) {
    input = packed_input(x, part);
    step = kPanel;
    panel = kPanel * part.batch.size();
  }
  const int64_t count = (part.rows.size() + kTileRows - 1) / kTileRows;
  for (int64_t i = 0; i < count; ++i) {
    const Range tile = split(part.rows.size(), 1, i, count);
    const Range rows = {part.rows.begin + tile.begin, part.rows.begin + tile.end};
    OuterTile t;
    t.a = x.grad_output + part.batch.begin * x.out + rows.begin;
    t.a_step = x.out;
    if (packing == Packing::both) {
      t.a = packed_grad_output(x, rows, part.batch, part.columns.begin == 0 ? sums : nullptr);
      t.a_step = kTileRows;
    }
    t.b = input;
    t.b_step = step;
    t.steps = part.batch.size();
    t.c_row = x.in;
    t.first = part.batch.begin == 0;
    for (int64_t column = part.columns.begin; column < part.columns.end; column += kPanel, t.b += panel) {
      t.c = x.grad_weight + rows.begin * x.in + column;
      tile_of<kTileRows, kTileVectors>(t, rows.size(), (part.columns.end - column) / V::width);
    }
  }
}

template <class Body>
void for_blocks(const Part& part, const Body& body) {
  for (int64_t m = part.batch.begin; m < part.batch.end; m += kBlockK) {
    for (int64_t k = part.columns.begin; k < part.columns.end; k += kColumnBlock<float>) {
      const Range columns = {k, std::min(k + kColumnBlock<float>, part.columns.end)};
      body(Part{part.rows, columns, {m, std::min(m + kBlockK, part.batch.end)}});
    }
  }
}

void register_tile(const Problem& x) {
  tiles<Packing::none>(x, whole(x));
  bias_pass(x);
}

template <Packing packing>
void blocks(const Problem& x) {
  for_blocks(whole(x), [&](const Part& block) { tiles<packing>(x, block); });
  bias_pass(x);
}

// With one thread: all packed.
void threads(const Problem& x, int threads) {
  std::vector<double> sums(x.out);
  parallel(threads, [&](int thread, int count) {
    Part part = whole(x);
    part.rows = split(x.out, kTileRows, thread, count);
    for_blocks(part, [&](const Part& block) { tiles<Packing::both>(x, block, sums.data()); });
  });
  store_bias(x, sums);
}

void climb(int64_t batch, int64_t in, int64_t out, const Options& options) {
  Buffer grad_output(batch * out), input(batch * in), grad_weight(out * in), grad_bias(out);
  const Problem x = {batch, in, out, grad_output.data, input.data, grad_weight.data, grad_bias.data};
  const int n = options.threads;

  std::vector<double> weight_truth(out * in), bias_truth(out);
  for (int64_t m = 0; m < batch; ++m) {
    for (int64_t i = 0; i < out; ++i) {
      const double dy = x.grad_output[m * out + i];
      for (int64_t k = 0; k < in; ++k) weight_truth[i * in + k] += dy * x.input[m * in + k];
      bias_truth[i] += dy;
    }
  }

  const auto text = [](int64_t i) { return std::to_string(i); };
  Ladder ladder("grad_weight and grad_bias, " + text(batch) + "x" + text(in) + " by " + text(out), "GFLOP/s",
                2.0 * batch * in * out);
  ladder.expect(grad_weight, std::move(weight_truth));
  ladder.expect(grad_bias, std::move(bias_truth));
  ladder.flop_limit(1);
  if (n > 1) ladder.flop_limit(n);
  if (x.batch * x.in * x.out <= 1 << 30) ladder.rung("dot_order", 1, [=] { dot_order(x); });  // else minutes
  ladder.rung("row_order", 1, [=] { row_order(x); });
  ladder.rung("register_tile", 1, [=] { register_tile(x); });
  ladder.rung("blocks", 1, [=] { blocks<Packing::none>(x); });
  ladder.rung("packed_input", 1, [=] { blocks<Packing::input>(x); });
  ladder.rung("packed_grad_output", 1, [=] { threads(x, 1); });
  if (n > 1) ladder.rung("threads", n, [=] { threads(x, n); });
  ladder.rung("linear_backward", n, [=] {
    const Entry<float> entry = {Product<float>{.M = x.out,
                                               .N = x.in,
                                               .K = x.batch,
                                               .a = {x.grad_output, 1, x.out},
                                               .b = {x.input, 1, x.in},
                                               .c = x.grad_weight,
                                               .row_sums = x.grad_bias}};
    run_program<float>({&entry, 1, 1}, nullptr, {.threads = n});
  });
  ladder.run(options);
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  if (options.quick()) {
    climb(2 * kBlockK + 8, kColumnBlock<float> + 5 * V::width, 33, options);
  } else {
    climb(4096, 4096, 512, options);
  }
  climb(64, 784, 128, options);
}
