#pragma once
// Loops over registers whose shape the compiler must not guess: masks, exponentials, rounding.
#include <type_traits>

#include "registers.h"

namespace vlmk::VLMK_ISA {
namespace {

template <class A>
struct Vectors : Registers<A> {
  using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef Index index_type __attribute__((vector_size(kRegisterBytes)));
};
template <class A>
using Vec = Register<A>;
template <class A>
using IndexVec = typename Vectors<A>::index_type;

template <class V, class T>
VLMK_INLINE V load(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}
template <class V, class T>
VLMK_INLINE void store(V v, T* to) {
  __builtin_memcpy(to, &v, sizeof(V));
}

// exp(x / T) within 2 ulp and the rounding of x / T, for x / T <= 88; 0 below -88, where exp_ stays positive. `factor` is
// log2(e) / T, and -127 / factor finite. The polynomial of Cephes' exp2f.
VLMK_INLINE Vec<float> exp_or_zero(Vec<float> x, float factor) {
  constexpr float rounding = 12582912.0f;  // a sum with it is rounded to an integer, which is in its low bits
  const Vec<float> low = Vec<float>{} - 127.0f / factor, y = x < low ? low : x;
  const Vec<float> n = y * factor + rounding, f = y * factor - (n - rounding);
  Vec<float> p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  const IndexVec<float> power = (__builtin_bit_cast(IndexVec<float>, n) << 23) + 0x3f800000;
  return p * __builtin_bit_cast(Vec<float>, power);
}
VLMK_INLINE Vec<float> exp_or_zero(Vec<float> x) { return exp_or_zero(x, 1.44269504088896f); }
VLMK_INLINE Vec<double> exp_or_zero(Vec<double> x) {
  Vec<double> out{};
  for (int64_t i = 0; i < Vectors<double>::lanes; ++i) out[i] = std::exp(x[i]);
  return out;
}

// Rounded to bf16, ties away from zero: the upper halves of the words.
VLMK_INLINE Vec<uint32_t> rounded(Vec<float> x) { return __builtin_bit_cast(Vec<uint32_t>, x) + 0x8000u; }

// Two rows as one row of a B operand.
VLMK_INLINE Vec<uint32_t> paired(Vec<float> first, Vec<float> second) {
  return (rounded(first) >> 16) | (rounded(second) & 0xffff0000u);
}

typedef uint16_t Halves __attribute__((vector_size(kRegisterBytes / 2)));
VLMK_INLINE void store_rounded(Vec<float> x, bf16* to) { store(__builtin_convertvector(rounded(x) >> 16, Halves), to); }

}  // namespace
}  // namespace vlmk::VLMK_ISA
