// What the ladders share: data, the machine's limits, verification, turns.
//
// A ladder is one problem and functions that solve it, each with one idea more than the one before: its rungs. Every
// rung's result is compared with one in float64 before anything is timed. Then the rungs take turns, A B C, C B A, ...,
// and with them loops that reach a limit of this machine. What is printed are the times of each turn, one line per
// implementation, fields separated by tabs; ladder.py makes the tables.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cpu/simd/elements.h"
#include "../../csrc/cpu/threads/parallel.h"

namespace ladder {

using namespace mnist_ext;
using namespace mnist_ext::MNIST_EXT_ISA;

// The command line of each ladder: THREADS TURNS; without turns the rungs are verified only, on small shapes.
struct Options {
  int threads, turns;

  Options(int argc, char** argv) {
    if (argc != 3) {
      std::fprintf(stderr, "usage: %s THREADS TURNS\n", argv[0]);
      std::exit(2);
    }
    threads = std::atoi(argv[1]);
    turns = std::atoi(argv[2]);
  }
  bool quick() const { return turns == 0; }
};

// Random numbers in [-0.5, 0.5], aligned as PyTorch's tensors are.
struct Buffer {
  int64_t size;
  float* data;

  explicit Buffer(int64_t n) : size(n), data(static_cast<float*>(std::aligned_alloc(64, (n * 4 + 63) / 64 * 64))) {
    for (int64_t i = 0; i < n; ++i) data[i] = static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5f;
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
};

// What a rung has to write, and what it has to write there.
struct Output {
  Buffer* values;
  std::vector<double> truth;
};

class Ladder {
 public:
  // work: FLOP or bytes of one call, at least; unit: "GFLOP/s" or "GB/s".
  Ladder(std::string title, std::string unit, double work) : title_(title), unit_(unit), work_(work) {}

  // The largest error that is let pass is `tolerance` times the largest element.
  void expect(Buffer& output, std::vector<double> truth, double tolerance = 1e-5) {
    outputs_.push_back({&output, std::move(truth)});
    tolerance_ = tolerance;
  }

  // For a problem that is solved in place: to be called before each rung is verified. Else the outputs hold NaN.
  void start_from(std::function<void()> reset) { reset_ = std::move(reset); }

  void rung(const char* name, int threads, std::function<void()> run) {
    implementations_.push_back({"rung", name, threads, work_, std::move(run)});
  }

  // The same work as multiply-adds of registers, as many at once as keep the core busy.
  void flop_limit(int threads) {
    constexpr int64_t steps = 1 << 14;
    const double work = threads * 2.0 * steps * kChains * Vec<float>::width;
    implementations_.push_back({"limit", "multiply-adds", threads, work,
                                [threads] { parallel(threads, [](int, int) { multiply_add(steps); }); }});
  }

  // The same work as bytes of a copy, read and written. `footprint`: the bytes that the ladder's problem occupies, so
  // that both live in the same caches.
  void copy_limit(int threads, int64_t footprint) {
    const int64_t half = footprint / 8;  // floats
    if (!copied_) copied_ = std::make_unique<Buffer>(2 * half);
    implementations_.push_back({"limit", "copy", threads, 8.0 * half, [this, threads, half] {
                                  parallel(threads, [&](int thread, int count) {
                                    const Range part = split(half, 16, thread, count);
                                    const float* from = copied_->data + part.begin;
                                    std::memcpy(copied_->data + half + part.begin, from, part.size() * sizeof(float));
                                  });
                                }});
  }

  // Verifies every rung, then times all; ends the program where a result is wrong.
  void run(const Options& options) {
    std::printf("ladder\t%s\t%s\t%.9g\n", title_.c_str(), unit_.c_str(), work_);
    for (const Implementation& implementation : implementations_) {
      if (implementation.kind == "rung") verify(implementation);
    }
    if (options.quick()) return;
    std::vector<int> calls;
    double turn = 0;
    for (const Implementation& c : implementations_) {
      double once = microseconds(c, 1);
      if (once < kTurn) once = microseconds(c, 3);  // the first call was slow for being the first
      calls.push_back(std::max(1, static_cast<int>(kTurn / once)));
      turn += calls.back() * once;
    }
    const int turns = std::clamp(static_cast<int>(kPatience / turn), std::min(3, options.turns), options.turns);
    std::vector<std::vector<double>> times(implementations_.size());
    for (int t = 0; t < turns; ++t) {
      for (std::size_t k = 0; k < times.size(); ++k) {
        const std::size_t i = t % 2 == 0 ? k : times.size() - 1 - k;
        times[i].push_back(microseconds(implementations_[i], calls[i]));
      }
    }
    for (std::size_t i = 0; i < times.size(); ++i) print(implementations_[i], times[i]);
    std::fflush(stdout);
  }

 private:
  struct Implementation {
    std::string kind, name;
    int threads;
    double work;
    std::function<void()> run;
  };

  static constexpr double kTurn = 20e3, kPatience = 60e6;  // microseconds
  // Multiply-adds that are under way at once: more than latency times throughput of any core, and few enough for 16
  // registers.
  static constexpr int kChains = 12;

  static void multiply_add(int64_t steps) {
    using V = Vec<float>;
    V sum[kChains] = {};
    V x = uncontracted(V::broadcast(1e-3f)), y = x;
    for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 16
      for (int k = 0; k < kChains; ++k) {
        y = uncontracted(y);  // or the product were computed once, where it is an instruction of its own
        sum[k] = fma(x, y, sum[k]);
      }
    }
    for (int k = 1; k < kChains; ++k) sum[0] = sum[0] + sum[k];
    [[maybe_unused]] volatile float used = reduce_add(sum[0]);
  }

  static double microseconds(const Implementation& implementation, int calls) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < calls; ++i) implementation.run();
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count() / calls;
  }

  void verify(const Implementation& rung) {
    for (const Output& o : outputs_) std::fill_n(o.values->data, o.values->size, std::nanf(""));
    if (reset_) reset_();
    rung.run();
    for (const Output& o : outputs_) {
      double largest = 0, error = 0;
      for (int64_t i = 0; i < o.values->size; ++i) {
        const double difference = std::abs(o.values->data[i] - o.truth[i]);
        largest = std::max(largest, std::abs(o.truth[i]));
        error = difference <= error ? error : difference;  // NaN stays
        if (error != error) break;
      }
      if (!(error <= tolerance_ * largest)) {
        std::fprintf(stderr, "%s: %s is wrong: error %.3g of %.3g\n", title_.c_str(), rung.name.c_str(), error,
                     largest);
        std::exit(1);
      }
    }
    std::printf("verified\t%s\n", rung.name.c_str());
  }

  // A limit's times are those of the ladder's work.
  void print(const Implementation& c, const std::vector<double>& times) const {
    std::printf("%s\t%s\t%d", c.kind.c_str(), c.name.c_str(), c.threads);
    for (const double time : times) std::printf("\t%.6g", time * work_ / c.work);
    std::printf("\n");
  }

  std::string title_, unit_;
  double work_, tolerance_ = 0;
  std::vector<Output> outputs_;
  std::function<void()> reset_;
  std::vector<Implementation> implementations_;
  std::unique_ptr<Buffer> copied_;
};

}  // namespace ladder
