// exp, log and tanh of csrc/cpu/simd of every float32 that the kernels can give them, and the conversions of bfloat16
// and float16, both ways; for one instruction set.
//
//     exhaustive STEP     every STEP-th input, and the last one of each range
//
// Errors are those of the result against libm's function in double, before that is rounded, in units in the last place
// (ulp) of the binade that the true value lies in. libm's own error, at most 2 ulp of double, is below 1e-8 of those,
// so that double is enough: the table-maker's dilemma, which side of a tie a true value lies on, does not arise where
// no rounded reference is compared with. Functions of float64 are sampled, against long double.
//
// Prints CSV: function, range, inputs, largest error, where, then the inputs by error: below kBinWidth ulp, below twice
// that, and so on; the last ones are all others.
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "../../csrc/cpu/simd/elements.h"
#include "../../csrc/cpu/simd/exp_log.h"
#include "../../csrc/cpu/simd/tanh.h"

namespace mnist_ext::MNIST_EXT_ISA {
namespace {

constexpr int kBins = 7;
constexpr double kBinWidth = 0.25;
constexpr int kBlock = 256;  // of inputs, for loops that the compiler vectorizes

template <class T>
using Wide = std::conditional_t<sizeof(T) == sizeof(float), double, long double>;

// As bits of floats: those of negative numbers grow as the numbers fall.
template <class T>
using BitsOfInput = std::conditional_t<sizeof(T) == sizeof(float), uint32_t, uint64_t>;

// Not libm's, for a billion of them.
int binade(double x) { return static_cast<int>(same_bits<uint64_t>(x) >> 52 & 0x7ff) - 1023; }
double scaled(double x, int exponent) { return x * same_bits<double>(static_cast<uint64_t>(exponent + 1023) << 52); }

int binade(long double x) { return std::ilogb(x); }
double scaled(long double x, int exponent) { return static_cast<double>(std::ldexp(x, exponent)); }

// In ulp of the true value; those of subnormal numbers are the smallest ones.
template <class T>
double error_of(T got, Wide<T> truth) {
  constexpr int digits = sizeof(T) == sizeof(float) ? FLT_MANT_DIG : DBL_MANT_DIG;
  constexpr int lowest = sizeof(T) == sizeof(float) ? FLT_MIN_EXP - 1 : DBL_MIN_EXP - 1;
  const int exponent = std::max(binade(truth), lowest) - (digits - 1);
  const double error = scaled(std::fabs(got - truth), -exponent);
  const bool same = (got == truth) | ((got != got) & (truth != truth));
  const bool finite = (std::fabs(got) < INFINITY) & (std::fabs(truth) < INFINITY);
  return same ? 0 : finite & (truth != 0) ? error : INFINITY;
}

template <class T>
struct Errors {
  int64_t inputs = 0, counts[kBins] = {};
  double largest = 0;
  T where = 0;

  void add(T x, double error) {
    ++inputs;
    ++counts[error < kBins * kBinWidth ? static_cast<int>(error / kBinWidth) : kBins - 1];
    if (error > largest) largest = error, where = x;
  }

  void add(const Errors& other) {
    inputs += other.inputs;
    for (int i = 0; i < kBins; ++i) counts[i] += other.counts[i];
    // Of equal ones always the same, whichever thread comes first.
    if (other.largest > largest || (other.largest == largest && std::fabs(other.where) < std::fabs(where))) {
      largest = other.largest, where = other.where;
    }
  }
};

// From first to last by their bits, every step-th and the last.
template <class T, class Function, class Truth>
void measure(const char* name, const char* range, T first, T last, int64_t step, const Function& function,
             const Truth& truth) {
  using V = Vec<T>;
  using Bits = BitsOfInput<T>;
  const Bits begin = same_bits<Bits>(first), end = same_bits<Bits>(last);
  const auto inputs = static_cast<int64_t>((end - begin + static_cast<Bits>(step - 1)) / static_cast<Bits>(step)) + 1;
  Errors<T> all;
#pragma omp parallel
  {
    Errors<T> errors;
#pragma omp for schedule(dynamic, 256)
    for (int64_t i = 0; i < inputs; i += kBlock) {
      T x[kBlock], y[kBlock];
      double error[kBlock];
      for (int j = 0; j < kBlock; ++j) {
        const Bits offset = static_cast<Bits>(i + j) * static_cast<Bits>(step);
        x[j] = same_bits<T>(begin + std::min(offset, end - begin));
      }
      for (int j = 0; j < kBlock; j += V::width) function(V::load(x + j)).store(y + j);
#pragma omp simd
      for (int j = 0; j < kBlock; ++j) error[j] = error_of(y[j], truth(x[j]));
      for (int j = 0; j < kBlock && i + j < inputs; ++j) errors.add(x[j], error[j]);
    }
#pragma omp critical
    all.add(errors);
  }
  std::printf("%s,%s,%lld,%.6f,%.9g", name, range, static_cast<long long>(all.inputs), all.largest,
              static_cast<double>(all.where));
  for (const int64_t count : all.counts) std::printf(",%lld", static_cast<long long>(count));
  std::printf("\n");
}

void measure_functions(int64_t step) {
  using V = Vec<float>;
  const auto exp_of = [](V x) { return exp(x); };
  const auto exp_in_double = [](float x) { return std::exp(static_cast<double>(x)); };
  // The next term of the series is below 2^-77.
  const auto exp_of_small = [](double x) { return 1 + x + x * x / 2; };
  // Below the smallest normal number: 0, as docs/semantics.md says.
  const auto zero_or_nan = [](float x) { return x != x ? NAN : 0.0; };
  const float lowest = -87.33654f, below_lowest = std::nextafter(lowest, -INFINITY);
  const float last_nan = same_bits<float>(0xffffffffu);
  measure("exp", "-87.33654 to -2^-25", -0x1p-25f, lowest, step, exp_of, exp_in_double);
  measure("exp", "-2^-25 to -0", -0.0f, -0x1p-25f, step, exp_of, exp_of_small);
  measure("exp", "0", 0.0f, 0.0f, step, exp_of, exp_in_double);
  measure("exp", "below -87.33654; NaN", below_lowest, last_nan, step, exp_of, zero_or_nan);

  const auto log_of = [](V x) { return log(x); };
  const auto log_in_double = [](float x) { return std::log(static_cast<double>(x)); };
  measure("log", "1 to inf; NaN", 1.0f, same_bits<float>(0x7fffffffu), step, log_of, log_in_double);
  measure("log", "2^-126 to 1", 0x1p-126f, 1.0f, step, log_of, log_in_double);

  // Of -x: the same but for the sign, or NaN.
  const auto tanh_of = [](V x) {
    const V y = tanh(x), of_minus_x = tanh(V{-x.raw});
    return V{y.raw == -of_minus_x.raw ? y.raw : V::broadcast(NAN).raw};
  };
  const auto tanh_in_double = [](float x) { return std::tanh(static_cast<double>(x)); };
  // The next term of the series, 2/15 x^5, is below 2^-50 of the value.
  const auto tanh_of_small = [](double x) { return x - x * x * x / 3; };
  const auto one_or_nan = [](float x) { return x != x ? NAN : 1.0; };
  measure("tanh", "2^-12 to 10", 0x1p-12f, 10.0f, step, tanh_of, tanh_in_double);
  measure("tanh", "0 to 2^-12", 0.0f, 0x1p-12f, step, tanh_of, tanh_of_small);
  measure("tanh", "10 to inf; NaN", 10.0f, same_bits<float>(0x7fffffffu), step, tanh_of, one_or_nan);
}

// A million inputs.
template <class Function, class Truth>
void sample(const char* name, const char* range, double first, double last, const Function& function,
            const Truth& truth) {
  const int64_t step = (same_bits<int64_t>(last) - same_bits<int64_t>(first)) / 1000000;
  measure(name, range, first, last, step, function, truth);
}

void sample_functions_of_double() {
  using V = Vec<double>;
  const auto exp_of = [](V x) { return exp(x); };
  const auto log_of = [](V x) { return log(x); };
  const auto tanh_of = [](V x) { return tanh(x); };
  const auto exp_in_long_double = [](long double x) { return std::exp(x); };
  const auto log_in_long_double = [](long double x) { return std::log(x); };
  const auto tanh_in_long_double = [](long double x) { return std::tanh(x); };
  sample("exp of float64", "-708.3964 to -2^-54", -0x1p-54, -708.396418532264, exp_of, exp_in_long_double);
  sample("log of float64", "1 to 2^64", 1.0, 0x1p64, log_of, log_in_long_double);
  sample("tanh of float64", "2^-30 to 25", 0x1p-30, 25.0, tanh_of, tanh_in_long_double);
}

// The value of a positive number of a format, by its definition; that of infinity is the power of 2 that would follow.
template <class T>
double value(uint32_t bits) {
  constexpr int mantissa_bits = std::is_same_v<T, BFloat16> ? 7 : 10, bias = std::is_same_v<T, BFloat16> ? 127 : 15;
  const uint32_t mantissa = bits & ((1u << mantissa_bits) - 1);
  const int exponent = static_cast<int>(bits >> mantissa_bits);
  if (exponent == 0) return std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return std::ldexp(mantissa + (1u << mantissa_bits), exponent - bias - mantissa_bits);
}

template <class T>
constexpr uint32_t kInfinity = std::is_same_v<T, BFloat16> ? 0x7f80 : 0x7c00;

// The bits of the first float that rounds to so many bits: the midpoint below, which double holds exactly and float
// too, if that is the even one of its neighbours.
template <class T>
uint32_t first_that_rounds_to(uint32_t bits) {
  if (bits == 0) return 0;
  const double midpoint = (value<T>(bits - 1) + value<T>(bits)) / 2;
  return same_bits<uint32_t>(static_cast<float>(midpoint)) + bits % 2;
}

bool is_nan(uint32_t bits, uint32_t infinity) { return (bits & 0x7fff) > infinity; }

// How many results of store and store_one are not `expected` but for the sign.
template <class T>
int64_t wrong_results(const uint32_t (&bits)[Vec<float>::width], uint32_t expected) {
  float x[Vec<float>::width];
  T stored[Vec<float>::width], stored_one[Vec<float>::width];
  std::memcpy(x, bits, sizeof(x));
  store(stored, Vec<float>::load(x), Vec<float>::width);
  for (int i = 0; i < Vec<float>::width; ++i) store_one(stored_one + i, x[i]);
  int64_t wrong = 0;
  for (int i = 0; i < Vec<float>::width; ++i) {
    const uint32_t want = expected | (bits[i] >> 16 & 0x8000);
    for (const uint32_t got : {stored[i].bits, stored_one[i].bits}) {
      // Which NaN is not promised.
      wrong += is_nan(expected, kInfinity<T>) ? !is_nan(got, kInfinity<T>) : got != want;
    }
  }
  return wrong;
}

template <class T>
void check_narrowing(const char* name, int64_t step) {
  constexpr int width = Vec<float>::width;
  int64_t inputs = 0, wrong = 0;
#pragma omp parallel for schedule(dynamic, 64) reduction(+ : inputs, wrong)
  for (uint32_t expected = 0; expected <= kInfinity<T> + 1; ++expected) {
    const bool nan = expected == kInfinity<T> + 1;
    const int64_t first = nan ? 0x7f800001 : first_that_rounds_to<T>(expected);
    const int64_t end = nan                        ? 0x80000000
                        : expected == kInfinity<T> ? 0x7f800001
                                                   : first_that_rounds_to<T>(expected + 1);
    for (const uint32_t sign : {0u, 0x80000000u}) {
      const int64_t n = (end - first + step - 2) / step + 1;
      for (int64_t i = 0; i < n; i += width) {
        uint32_t bits[width];
        for (int lane = 0; lane < width; ++lane) {
          bits[lane] = static_cast<uint32_t>(std::min(first + (i + lane) * step, end - 1)) | sign;
        }
        wrong += wrong_results<T>(bits, expected);
      }
      inputs += n;
    }
  }
  std::printf("%s,,%lld,%lld,\n", name, static_cast<long long>(inputs), static_cast<long long>(wrong));
}

template <class T>
void check_widening(const char* name) {
  int64_t wrong = 0;
  for (uint32_t begin = 0; begin < 0x10000; begin += Vec<float>::width) {
    T from[Vec<float>::width];
    float loaded[Vec<float>::width];
    for (int i = 0; i < Vec<float>::width; ++i) from[i].bits = static_cast<uint16_t>(begin + i);
    load(from, Vec<float>::width).store(loaded);
    for (int i = 0; i < Vec<float>::width; ++i) {
      const uint32_t bits = from[i].bits, magnitude = bits & 0x7fff;
      const double size = magnitude == kInfinity<T> ? INFINITY : value<T>(magnitude);
      for (const float got : {loaded[i], load_one(from + i)}) {
        const bool right = std::signbit(got) == (bits >> 15) && std::fabs(got) == size;
        wrong += is_nan(bits, kInfinity<T>) ? got == got : !right;
      }
    }
  }
  std::printf("%s,,65536,%lld,\n", name, static_cast<long long>(wrong));
}

}  // namespace
}  // namespace mnist_ext::MNIST_EXT_ISA

int main(int, char** argv) {
  using namespace mnist_ext;
  using namespace MNIST_EXT_ISA;
  const int64_t step = std::atoll(argv[1]);
  measure_functions(step);
  sample_functions_of_double();
  check_widening<BFloat16>("bfloat16 to float32");
  check_widening<Float16>("float16 to float32");
  check_narrowing<BFloat16>("float32 to bfloat16", step);
  check_narrowing<Float16>("float32 to float16", step);
}
