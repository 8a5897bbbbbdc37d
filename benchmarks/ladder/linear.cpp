// The forward of a linear layer with bias and ReLU, 64x784 by 128: from a triple loop to dot_gemm.h. Each element of
// the result is a dot product of a row of the input with a row of the weight; both lie contiguously.
//
//   scalar_chain       one sum, one multiply-add after the other
//   vector_chain       a vector of sums
//   four_chains        four of them, so that no multiply-add waits for the one before it
//   tile<2, 2>         two rows by two neurons share the vectors that they load
//   tile<6, 4>         as many as there are registers for (3 by 4 where there are 16)
//   sums_of_four       sums over the lanes of four vectors at a time
//   fused              bias and ReLU before the result is stored
//   threads            each its share of the neurons
//   linear_forward     the kernel in use
//
//   python benchmarks/ladder/ladder.py linear
//
// Rungs of vectors take a K that is a multiple of the vector's width, and tiles an N that is a multiple of theirs; the
// kernel in use takes any.
#include "../../csrc/cpu/executor.h"
#include "ladder.h"

namespace {

using namespace ladder;
using V = Vec<float>;

struct Problem {
  int64_t M, N, K;
  const float *input, *weight, *bias;  // [M, K], [N, K], [N]
  float* out;                          // [M, N]
};

// As the ops of a framework do it: each pass reads and writes the whole result.
void add_bias(const Problem& problem) {
  for (int64_t row = 0; row < problem.M; ++row) {
    for (int64_t n = 0; n < problem.N; ++n) problem.out[row * problem.N + n] += problem.bias[n];
  }
}

void relu(const Problem& problem) {
  for (int64_t i = 0; i < problem.M * problem.N; ++i) problem.out[i] = problem.out[i] < 0 ? 0 : problem.out[i];
}

template <class Dot>
void by_element(const Problem& problem, const Dot& dot) {
  for (int64_t row = 0; row < problem.M; ++row) {
    for (int64_t n = 0; n < problem.N; ++n) {
      problem.out[row * problem.N + n] =
          dot(problem.input + row * problem.K, problem.weight + n * problem.K, problem.K);
    }
  }
  add_bias(problem);
  relu(problem);
}

float scalar_dot(const float* a, const float* b, int64_t K) {
  float sum = 0;
  for (int64_t p = 0; p < K; ++p) sum += a[p] * b[p];
  return sum;
}

void scalar_chain(const Problem& problem) { by_element(problem, scalar_dot); }

template <int chains>
float vector_dot(const float* a, const float* b, int64_t K) {
  V sum[chains] = {};
  int64_t p = 0;
  for (; p + chains * V::width <= K; p += chains * V::width) {
#pragma GCC unroll 8
    for (int k = 0; k < chains; ++k) {
      sum[k] = fma(V::load(a + p + k * V::width), V::load(b + p + k * V::width), sum[k]);
    }
  }
  for (; p < K; p += V::width) sum[0] = fma(V::load(a + p), V::load(b + p), sum[0]);
  for (int k = 1; k < chains; ++k) sum[0] = sum[0] + sum[k];
  return reduce_add(sum[0]);
}

void vector_chain(const Problem& problem) { by_element(problem, vector_dot<1>); }

void four_chains(const Problem& problem) { by_element(problem, vector_dot<4>); }

// R rows by N neurons: per step R + N loads for R * N multiply-adds, in as many chains.
template <int R, int N>
MNIST_EXT_INLINE void dots(const float* a, const float* b, int64_t K, V (&sum)[R][N]) {
  for (int64_t p = 0; p < K; p += V::width) {
    V av[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) av[r] = V::load(a + r * K + p);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const V bv = V::load(b + n * K + p);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][n] = fma(av[r], bv, sum[r][n]);
    }
  }
}

struct SumEach {
  template <int R, int N>
  static void tile(const Problem& problem, int64_t row, int64_t n) {
    V sum[R][N] = {};
    dots(problem.input + row * problem.K, problem.weight + n * problem.K, problem.K, sum);
    for (int r = 0; r < R; ++r) {
      for (int k = 0; k < N; ++k) problem.out[(row + r) * problem.N + n + k] = reduce_add(sum[r][k]);
    }
  }
};

template <bool epilogue>
struct SumFour {
  template <int R, int N>
  static void tile(const Problem& problem, int64_t row, int64_t n) {
    V sum[R][N] = {};
    dots(problem.input + row * problem.K, problem.weight + n * problem.K, problem.K, sum);
    const Four<float> bias = Four<float>::load(problem.bias + n, 4);
    for (int r = 0; r < R; ++r) {
      Four<float> four = reduce_add(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
      if constexpr (epilogue) {
        four.raw += bias.raw;
        four.raw = four.raw < 0.0f ? 0.0f : four.raw;
      }
      four.store(problem.out + (row + r) * problem.N + n, 4);
    }
  }
};

// A tile of `rows` rows, at most R.
template <class Sum, int R, int N>
void tile_of(const Problem& problem, int64_t row, int64_t rows, int64_t n) {
  if constexpr (R > 1) {
    if (rows < R) return tile_of<Sum, R - 1, N>(problem, row, rows, n);
  }
  Sum::template tile<R, N>(problem, row, n);
}

// The weights of N neurons stay in the first-level cache while all rows of the input pass, from the second.
template <class Sum, int R, int N>
void tiles(const Problem& problem, Range neurons) {
  const int64_t count = (problem.M + R - 1) / R;
  for (int64_t n = neurons.begin; n < neurons.end; n += N) {
    for (int64_t i = 0; i < count; ++i) {
      const Range rows = split(problem.M, 1, i, count);  // of equal height, give or take one
      tile_of<Sum, R, N>(problem, rows.begin, rows.size(), n);
    }
  }
}

template <class Sum, int R, int N>
void tiles_and_passes(const Problem& problem) {
  tiles<Sum, R, N>(problem, {0, problem.N});
  add_bias(problem);
  relu(problem);
}

constexpr int kRows = kVectorRegisters == 32 ? 6 : 3;

void fused(const Problem& problem) { tiles<SumFour<true>, kRows, 4>(problem, {0, problem.N}); }

void threads(const Problem& problem, int threads) {
  parallel(threads,
           [&](int thread, int count) { tiles<SumFour<true>, kRows, 4>(problem, split(problem.N, 4, thread, count)); });
}

std::vector<double> truth(const Problem& problem) {
  std::vector<double> out;
  for (int64_t row = 0; row < problem.M; ++row) {
    for (int64_t n = 0; n < problem.N; ++n) {
      double sum = problem.bias[n];
      for (int64_t p = 0; p < problem.K; ++p)
        sum += double{problem.input[row * problem.K + p]} * problem.weight[n * problem.K + p];
      out.push_back(std::max(sum, 0.0));
    }
  }
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options(argc, argv);
  constexpr int64_t M = 64, N = 128, K = 784;
  Buffer input(M * K), weight(N * K), bias(N), out(M * N);
  const Problem problem = {M, N, K, input.data, weight.data, bias.data, out.data};
  const int n = options.threads;

  Ladder ladder("linear forward with bias and ReLU, 64x784 by 128", "GFLOP/s", 2.0 * M * K * N);
  ladder.expect(out, truth(problem));
  ladder.flop_limit(1);
  if (n > 1) ladder.flop_limit(n);
  ladder.rung("scalar_chain", 1, [=] { scalar_chain(problem); });
  ladder.rung("vector_chain", 1, [=] { vector_chain(problem); });
  ladder.rung("four_chains", 1, [=] { four_chains(problem); });
  ladder.rung("tile<2, 2>", 1, [=] { tiles_and_passes<SumEach, 2, 2>(problem); });
  ladder.rung(kRows == 6 ? "tile<6, 4>" : "tile<3, 4>", 1, [=] { tiles_and_passes<SumEach, kRows, 4>(problem); });
  ladder.rung("sums_of_four", 1, [=] { tiles_and_passes<SumFour<false>, kRows, 4>(problem); });
  ladder.rung("fused", 1, [=] { fused(problem); });
  if (n > 1) ladder.rung("threads", n, [=] { threads(problem, n); });
  ladder.rung("linear_forward", n, [=] {
    const Entry<float> entry = {Product<float>{.M = M,
                                               .N = N,
                                               .K = K,
                                               .a = {problem.input, K, 1},
                                               .b = {problem.weight, K, 1},
                                               .bias = problem.bias,
                                               .relu = true,
                                               .c = problem.out}};
    run_program<float>({&entry, 1, 1}, nullptr, {.threads = n});
  });
  ladder.run(options);
}
