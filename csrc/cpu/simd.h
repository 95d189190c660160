#pragma once
// Elementwise mathematics as plain inline functions that the compiler vectorises inside `#pragma omp simd` loops.
#include <cmath>
#include <cstdint>

#include "vlmkernels/types.h"

namespace vlmk::VLMK_ISA {
namespace {

#define VLMK_INLINE inline __attribute__((always_inline))

VLMK_INLINE float to_acc(float x) { return x; }
VLMK_INLINE double to_acc(double x) { return x; }
VLMK_INLINE float to_acc(bf16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }
VLMK_INLINE float to_acc(f16 x) {
  // The exponent is moved by a multiplication, which also handles subnormals; Inf and NaN take the largest exponent.
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  const float scaled = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : __builtin_bit_cast(uint32_t, scaled);
  return __builtin_bit_cast(float, bits | sign);
}

VLMK_INLINE void from_acc(float x, float& out) { out = x; }
VLMK_INLINE void from_acc(double x, double& out) { out = x; }
// To nearest, ties to even, for what arithmetic on bf16 inputs gives: a NaN whose low bits are all ones would not stay one.
VLMK_INLINE void round_to(float x, bf16& out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  out.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
VLMK_INLINE void round_to(float x, float& out) { out = x; }
VLMK_INLINE void round_to(double x, double& out) { out = x; }
VLMK_INLINE void from_acc(float x, bf16& out) {
  const bool nan = x != x;
  round_to(x, out);
  out.bits = nan ? 0x7fc0u : out.bits;
}
VLMK_INLINE void from_acc(float x, f16& out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Adding 2^k with the right k rounds a subnormal result to nearest even in the float adder.
  const float small = __builtin_bit_cast(float, magnitude) + 0.5f;
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, small) - 0x3f000000u;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out.bits = static_cast<uint16_t>(half | sign);
}

// exp(x) within 1.5 ulp for x <= 88, which the callers ensure; exp(-87.33) below that.
VLMK_INLINE float exp_(float x) {
  const float y = x < -87.33f ? -87.33f : x;
  const float z = y * 1.44269504089f + 12582912.0f;  // y / ln 2, rounded into the low mantissa bits
  const float n = z - 12582912.0f;
  const float r = (y - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * __builtin_bit_cast(float, (__builtin_bit_cast(uint32_t, z) << 23) + 0x3f800000u);  // times 2^n
}
VLMK_INLINE double exp_(double x) { return std::exp(x); }

// log(1 + e) for 0 <= e <= 1, relative error below 2 ulp: 2 atanh(e / (2 + e)) as an odd polynomial.
VLMK_INLINE float log1p_(float e) {
  const float s = e / (2.0f + e), q = s * s;
  float p = 1.161952889e-1f;
  p = p * q + 1.085166071e-1f;
  p = p * q + 1.429629110e-1f;
  p = p * q + 1.999985071e-1f;
  p = p * q + 3.333333367e-1f;
  return 2.0f * s + 2.0f * s * q * p;
}
VLMK_INLINE double log1p_(double e) { return std::log1p(e); }

// A vector register's lane adds 16 numbers at most before the sum goes on in double, whatever the register's width; so does a
// column before it goes on beyond 16 rows. A long chain of equal numbers would be rounded to one side again and again.
constexpr int64_t kSumRows = 16;
#if defined(__AVX512F__)
constexpr int64_t kSumPart = 256;
#elif defined(__AVX__)
constexpr int64_t kSumPart = 128;
#else
constexpr int64_t kSumPart = 64;
#endif

template <class A>
VLMK_INLINE A max_(A a, A b) {
  return a > b ? a : b;
}
template <class A>
VLMK_INLINE constexpr A min_(A a, A b) {
  return a < b ? a : b;
}

// <x, y>
template <class X, class Y>
VLMK_INLINE acc_t<X> dot(const X* x, const Y* y, int64_t count) {
  double sum = 0;
  for (int64_t c0 = 0; c0 < count; c0 += kSumPart) {
    acc_t<X> part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t c = c0; c < min_(c0 + kSumPart, count); ++c) part += to_acc(x[c]) * to_acc(y[c]);
    sum += part;
  }
  return static_cast<acc_t<X>>(sum);
}

}  // namespace
}  // namespace vlmk::VLMK_ISA
