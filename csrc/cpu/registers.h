#pragma once
// Vectors of one register of the instruction set: what is wider goes through memory.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "simd.h"

namespace vlmk::VLMK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kRegisterBytes = 64;
#elif defined(__AVX__)
constexpr int64_t kRegisterBytes = 32;
#else
constexpr int64_t kRegisterBytes = 16;
#endif

template <class A>
struct Registers {
  static constexpr int64_t lanes = kRegisterBytes / sizeof(A);
  typedef A type __attribute__((vector_size(kRegisterBytes)));
};
template <class A>
using Register = typename Registers<A>::type;

template <class A>
VLMK_INLINE Register<A> from_memory(const A* from) {
  Register<A> x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

// Lane l of x, or of y where `l & half`, plus the lane `half` away: two registers in one, of half as many sums.
template <int half, class A>
VLMK_INLINE Register<A> fold(Register<A> x, Register<A> y) {
  using Lane = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  constexpr Lane lanes = Registers<A>::lanes;
  typedef Lane Lanes __attribute__((vector_size(kRegisterBytes)));
  Lanes here, there, away;
#pragma GCC unroll 16
  for (Lane l = 0; l < lanes; ++l) here[l] = l & half ? lanes + l : l, there[l] = l & half ? l : lanes + l, away[l] = l ^ half;
  return __builtin_shuffle(x, y, here) + __builtin_shuffle(__builtin_shuffle(x, y, there), away);
}

// Lane l of the result is the sum of the lanes of x[l % count], formed in one order whatever the count, a power of two.
template <int count, class A, int half = 1>
VLMK_INLINE Register<A> sums_of(const Register<A>* x) {
  if constexpr (half == Registers<A>::lanes) {
    return x[0];
  } else {
    constexpr int left = count > 1 ? count / 2 : 1;
    Register<A> folded[left];
#pragma GCC unroll 8
    for (int i = 0; i < left; ++i) folded[i] = fold<half, A>(x[2 * i], x[count > 1 ? 2 * i + 1 : 0]);
    return sums_of<left, A, 2 * half>(folded);
  }
}

VLMK_INLINE Register<float> floats_from_memory(const float* from) { return from_memory(from); }
VLMK_INLINE Register<double> floats_from_memory(const double* from) { return from_memory(from); }
VLMK_INLINE Register<float> floats_from_memory(const int8_t* from) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  return Register<float>{static_cast<float>(from[0]), static_cast<float>(from[1]), static_cast<float>(from[2]),
                         static_cast<float>(from[3])};
#endif
}
VLMK_INLINE Register<float> floats_from_memory(const bf16* from) {
#if defined(__AVX512F__)
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
#elif defined(__AVX2__)
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
#else
  return Register<float>{to_acc(from[0]), to_acc(from[1]), to_acc(from[2]), to_acc(from[3])};
#endif
}

}  // namespace
}  // namespace vlmk::VLMK_ISA
