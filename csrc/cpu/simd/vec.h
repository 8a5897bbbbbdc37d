// One small SIMD vector type for every instruction set.
//
// It is the vector extension of GCC and Clang: +, -, * and comparisons are the compiler's own, and only loads and
// stores of part of a vector need the instruction set's names. The width follows from the flags that the including file
// is compiled with. Everything lives in a namespace named after the instruction set, so that the linker never takes one
// build of a function for another.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if !defined(MNIST_EXT_ISA)
#error "MNIST_EXT_ISA is to be defined as the name of the instruction set that this is compiled for"
#endif

#define MNIST_EXT_INLINE inline __attribute__((always_inline))

// For tools/sanitize.py: sanitizers do not see masked loads and stores, so that there are none under them, and small
// shapes are shared by all threads too.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define MNIST_EXT_SANITIZED 1
#else
#define MNIST_EXT_SANITIZED 0
#endif

namespace mnist_ext::MNIST_EXT_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

// Decides how large a register tile may be.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kVectorRegisters = 32;
#else
inline constexpr int kVectorRegisters = 16;
#endif

// A number that the compiler knows.
template <int n>
struct Constant {};

// Calls body(Constant<n>) for 1 <= n <= most.
template <int most, class Body>
MNIST_EXT_INLINE void with_constant(int n, const Body& body) {
  if constexpr (most > 1) {
    if (n < most) return with_constant<most - 1>(n, body);
  }
  body(Constant<most>{});
}

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = int32_t;
};
template <>
struct BitsOf<double> {
  using type = int64_t;
};

template <class T>
struct Vec {
  static constexpr int width = kVectorBytes / sizeof(T);
  using Bits = typename BitsOf<T>::type;
  typedef T Raw __attribute__((vector_size(kVectorBytes)));
  typedef Bits RawBits __attribute__((vector_size(kVectorBytes)));

  Raw raw;

  // x - 0 is x for every x, so that no subtraction is left (0 + x is not: -0).
  static MNIST_EXT_INLINE Vec broadcast(T x) { return {x - Raw{}}; }

  static MNIST_EXT_INLINE Vec load(const T* p) {
    Vec v;
    std::memcpy(&v.raw, p, sizeof(v.raw));
    return v;
  }

  MNIST_EXT_INLINE void store(T* p) const { std::memcpy(p, &raw, sizeof(raw)); }

  // The first n lanes from p, 0 < n <= width; the others are `fill`. Reads nothing behind p[n - 1].
  static MNIST_EXT_INLINE Vec load_partial(const T* p, int n, T fill = T(0));

  // Stores the first n lanes.
  MNIST_EXT_INLINE void store_partial(T* p, int n) const;

  friend MNIST_EXT_INLINE Vec operator+(Vec a, Vec b) { return {a.raw + b.raw}; }
  friend MNIST_EXT_INLINE Vec operator-(Vec a, Vec b) { return {a.raw - b.raw}; }
  friend MNIST_EXT_INLINE Vec operator*(Vec a, Vec b) { return {a.raw * b.raw}; }
  friend MNIST_EXT_INLINE Vec operator/(Vec a, Vec b) { return {a.raw / b.raw}; }
};

// a * b + c, one rounding where the instruction set has a fused multiply-add (the build sets -ffp-contract=fast).
// NEON's by name: behind the branches of its load_partial GCC leaves a multiplication in one block and the addition in
// another.
template <class T>
MNIST_EXT_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(__aarch64__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return {vfmaq_f32(c.raw, a.raw, b.raw)};
  } else {
    return {vfmaq_f64(c.raw, a.raw, b.raw)};
  }
#else
  return {a.raw * b.raw + c.raw};
#endif
}

// x, as far as the compiler knows changed: a product is rounded before it is added to anything.
template <class T>
MNIST_EXT_INLINE Vec<T> uncontracted(Vec<T> x) {
#if defined(__x86_64__)
  __asm__("" : "+x"(x.raw));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x.raw));
#endif
  return x;
}

// The larger one; b where either is NaN. (With AVX-512 the compiler would make a comparison and a blend of the general
// form. The forms with a mask: GCC warns of its own header's others.)
template <class T>
MNIST_EXT_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    return {_mm512_maskz_max_ps(0xffff, a.raw, b.raw)};
  } else {
    return {_mm512_maskz_max_pd(0xff, a.raw, b.raw)};
  }
#else
  return {a.raw > b.raw ? a.raw : b.raw};
#endif
}

// All bits of the first n lanes.
template <class T>
MNIST_EXT_INLINE typename Vec<T>::RawBits lanes_below(int n) {
  typename Vec<T>::RawBits lane;
  for (int i = 0; i < Vec<T>::width; ++i) lane[i] = i;
  return lane < n;
}

// x in the first n lanes, `fill` in the others.
template <class T>
MNIST_EXT_INLINE Vec<T> first_lanes(Vec<T> x, int n, T fill = T(0)) {
  return {lanes_below<T>(n) ? x.raw : Vec<T>::broadcast(fill).raw};
}

// x where mask is > 0 or NaN, else 0: the gradient of ReLU, whose output the mask is.
template <class T>
MNIST_EXT_INLINE Vec<T> where_positive(Vec<T> mask, Vec<T> x) {
  const typename Vec<T>::Raw zero{};
  return {mask.raw <= zero ? zero : x.raw};
}

// The lanes I of a and b, numbered through both: __builtin_shufflevector, which GCC has from 12 on.
template <int... I, class Raw>
MNIST_EXT_INLINE auto shuffle(Raw a, Raw b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  using T = std::remove_reference_t<decltype(a[0])>;
  typedef T Result __attribute__((vector_size(sizeof...(I) * sizeof(T))));
  if constexpr (sizeof(Result) > sizeof(Raw)) {
    Result both;
    std::memcpy(&both, &a, sizeof(a));
    std::memcpy(reinterpret_cast<char*>(&both) + sizeof(a), &b, sizeof(b));
    return shuffle<I...>(both, both);
  } else {
    typedef std::conditional_t<sizeof(T) == 8, int64_t, int32_t> Lanes __attribute__((vector_size(sizeof(Raw))));
    const Raw shuffled = __builtin_shuffle(a, b, Lanes{I...});
    Result result;
    std::memcpy(&result, &shuffled, sizeof(result));
    return result;
  }
#endif
}

// Combines the two halves of a vector until n lanes are left.
template <int n, class Raw, class Op, std::size_t... I>
MNIST_EXT_INLINE auto fold(Raw v, Op op, std::index_sequence<I...>) {
  constexpr int half = sizeof...(I);
  if constexpr (half < n) {
    return v;
  } else {
    const auto combined = op(shuffle<static_cast<int>(I)...>(v, v), shuffle<static_cast<int>(I + half)...>(v, v));
    return fold<n>(combined, op, std::make_index_sequence<half / 2>{});
  }
}

// The sums of the lanes in n of them.
template <int n, class T>
MNIST_EXT_INLINE auto fold_sum(Vec<T> v) {
  return fold<n>(v.raw, [](auto a, auto b) { return a + b; }, std::make_index_sequence<Vec<T>::width / 2>{});
}

template <class T>
MNIST_EXT_INLINE T reduce_add(Vec<T> v) {
  return fold_sum<1>(v)[0];
}

template <class T>
MNIST_EXT_INLINE T reduce_max(Vec<T> v) {
  const auto larger = [](auto a, auto b) { return a > b ? a : b; };
  return fold<1>(v.raw, larger, std::make_index_sequence<Vec<T>::width / 2>{})[0];
}

// Four numbers in one register, or two where those are of 128 bits.
template <class T>
struct Four {
  typedef T Raw __attribute__((vector_size(4 * sizeof(T))));

  Raw raw;

  // The first n of p, 0 < n <= 4; the others are 0.
  static MNIST_EXT_INLINE Four load(const T* p, int n) {
    Four v{};
    if (n == 4) {
      std::memcpy(&v.raw, p, sizeof(v.raw));
    } else {
      for (int i = 0; i < n; ++i) v.raw[i] = p[i];
    }
    return v;
  }

  MNIST_EXT_INLINE void store(T* p, int n) const {
    if (n == 4) {
      std::memcpy(p, &raw, sizeof(raw));
    } else {
      for (int i = 0; i < n; ++i) p[i] = raw[i];
    }
  }
};

// Groups of g lanes of a and b by turns, from the lower half of each 128 bits of both, plus those from the upper half.
template <int g, class T, std::size_t... I>
MNIST_EXT_INLINE typename Vec<T>::Raw add_interleaved(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
  constexpr int width = Vec<T>::width, n = 16 / sizeof(T);
  constexpr auto from = [](int i) { return i / n * n + i % n / (2 * g) * g + i % g + (i / g % 2 ? width : 0); };
  return shuffle<from(I)...>(a.raw, b.raw) + shuffle<(from(I) + n / 2)...>(a.raw, b.raw);
}

template <int g, class T>
MNIST_EXT_INLINE Vec<T> add_interleaved(Vec<T> a, Vec<T> b) {
  return {add_interleaved<g>(a, b, std::make_index_sequence<Vec<T>::width>{})};
}

// The sums over the lanes of four vectors. Together they take half the instructions of four times reduce_add.
MNIST_EXT_INLINE Four<float> reduce_add(Vec<float> a, Vec<float> b, Vec<float> c, Vec<float> d) {
  return {fold_sum<4>(add_interleaved<2>(add_interleaved<1>(a, b), add_interleaved<1>(c, d)))};
}

MNIST_EXT_INLINE Four<double> reduce_add(Vec<double> a, Vec<double> b, Vec<double> c, Vec<double> d) {
  const auto ab = fold_sum<2>(add_interleaved<1>(a, b)), cd = fold_sum<2>(add_interleaved<1>(c, d));
  return {shuffle<0, 1, 2, 3>(ab, cd)};
}

// Swaps the off-diagonal quarters of each 2h x 2h block that rows a and b = a + h belong to (Eklundh's method).
template <int h, class Raw, std::size_t... K>
MNIST_EXT_INLINE void swap_quarters(Raw& a, Raw& b, std::index_sequence<K...>) {
  constexpr int width = sizeof...(K);
  const Raw first = shuffle<static_cast<int>(K & h ? width + K - h : K)...>(a, b);
  b = shuffle<static_cast<int>(K & h ? width + K : K + h)...>(a, b);
  a = first;
}

// Transposes a square block of a vector's width in registers.
template <class T, int h = Vec<T>::width / 2>
MNIST_EXT_INLINE void transpose(Vec<T> (&rows)[Vec<T>::width]) {
  constexpr int width = Vec<T>::width;
#pragma GCC unroll 16
  for (int i = 0; i < width; ++i) {
    if ((i & h) == 0) swap_quarters<h>(rows[i].raw, rows[i + h].raw, std::make_index_sequence<width>{});
  }
  if constexpr (h > 1) transpose<T, h / 2>(rows);
}

#if defined(__AVX512F__) && !MNIST_EXT_SANITIZED

template <>
MNIST_EXT_INLINE Vec<float> Vec<float>::load_partial(const float* p, int n, float fill) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << n) - 1), p)};
}

template <>
MNIST_EXT_INLINE Vec<double> Vec<double>::load_partial(const double* p, int n, double fill) {
  return {_mm512_mask_loadu_pd(_mm512_set1_pd(fill), static_cast<__mmask8>((1u << n) - 1), p)};
}

template <>
MNIST_EXT_INLINE void Vec<float>::store_partial(float* p, int n) const {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), raw);
}

template <>
MNIST_EXT_INLINE void Vec<double>::store_partial(double* p, int n) const {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), raw);
}

#else

#if defined(__AVX2__) && !MNIST_EXT_SANITIZED

template <class T>
MNIST_EXT_INLINE Vec<T> Vec<T>::load_partial(const T* p, int n, T fill) {
  const RawBits mask = lanes_below<T>(n);
  Vec v;
  if constexpr (sizeof(T) == sizeof(float)) {
    v.raw = _mm256_maskload_ps(p, reinterpret_cast<__m256i>(mask));
  } else {
    v.raw = _mm256_maskload_pd(p, reinterpret_cast<__m256i>(mask));
  }
  return {mask ? v.raw : broadcast(fill).raw};
}

#else

template <class T>
MNIST_EXT_INLINE Vec<T> Vec<T>::load_partial(const T* p, int n, T fill) {
  Vec v = broadcast(fill);
#pragma GCC unroll 4
  for (int i = 0; i < width; ++i) {
    if (i < n) v.raw[i] = p[i];  // lanes of constant numbers stay in the register
  }
  return v;
}

#endif

template <class T, class Raw, std::size_t... I>
MNIST_EXT_INLINE void store_halves(T* p, int n, Raw v, std::index_sequence<I...>) {
  constexpr int half = sizeof...(I);
  auto rest = shuffle<static_cast<int>(I)...>(v, v);
  if (n & half) {
    std::memcpy(p, &rest, sizeof(rest));
    rest = shuffle<static_cast<int>(I + half)...>(v, v);
    p += half;
  }
  if constexpr (half > 1) store_halves(p, n, rest, std::make_index_sequence<half / 2>{});
}

// In pieces: a masked store of AVX2 takes AMD's cores six times as long.
template <class T>
MNIST_EXT_INLINE void Vec<T>::store_partial(T* p, int n) const {
  n == width ? store(p) : store_halves(p, n, raw, std::make_index_sequence<width / 2>{});
}

#endif

}  // namespace mnist_ext::MNIST_EXT_ISA
