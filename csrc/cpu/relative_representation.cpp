#include "vlmkernels/relative_representation.h"

#include "registers.h"

namespace vlmk::VLMK_ISA {
namespace {

constexpr double kMostFactors = 64;  // a larger power is left to the mathematical library, as is one with a fraction

template <class A>
VLMK_INLINE Register<A> power(Register<A> x, int64_t p) {
  Register<A> result = Register<A>{} + A(1);
  for (; p; p >>= 1) {
    if (p & 1) result *= x;
    x *= x;
  }
  return result;
}

template <class A>
VLMK_INLINE Register<A> power(Register<A> x, double p) {
  for (int64_t lane = 0; lane < Registers<A>::lanes; ++lane) x[lane] = std::pow(x[lane], static_cast<A>(p));
  return x;
}

// r_j in place of s_j, and the sum of their squares; 0 to any power is 0.
template <class A, class P>
VLMK_INLINE double powers(A* row, int64_t k, A top, P p) {
  constexpr int64_t lanes = Registers<A>::lanes;
  double sum = 0;
  for (int64_t c0 = 0; c0 < k; c0 += kSumRows * lanes) {
    Register<A> part{};
    for (int64_t c = c0; c < min_(c0 + kSumRows * lanes, k); c += lanes) {
      const int64_t count = min_(lanes, k - c);
      Register<A> x{};
      __builtin_memcpy(&x, row + c, count * sizeof(A));
      x = power<A>(top > 0 ? x / top : x, p);
      __builtin_memcpy(row + c, &x, count * sizeof(A));
      part += x * x;
    }
    for (int64_t lane = 0; lane < lanes; ++lane) sum += part[lane];
  }
  return sum;
}

}  // namespace

template <class T>
void relative_representation(const T* similarities, int64_t rows, int64_t k, double p, acc_t<T>* values) {
  using A = acc_t<T>;
  const bool whole = p <= kMostFactors && p == static_cast<double>(static_cast<int64_t>(p));
  for (int64_t i = 0; i < rows; ++i) {
    const T* s = similarities + i * k;
    A* row = values + i * k;
    A top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t c = 0; c < k; ++c) {
      const A x = to_acc(s[c]);
      row[c] = x < 0 ? A(0) : x;  // NaN stays
      top = max_(top, row[c]);
    }
    const double sum = whole ? powers(row, k, top, static_cast<int64_t>(p)) : powers(row, k, top, p);
    const A factor = static_cast<A>(sum == 0 ? 1 : 1 / std::sqrt(sum));
#pragma omp simd
    for (int64_t c = 0; c < k; ++c) row[c] *= factor;
  }
}

#define VLMK_INSTANTIATE(T) template void relative_representation(const T*, int64_t, int64_t, double, acc_t<T>*);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)
VLMK_INSTANTIATE(f16)

}  // namespace vlmk::VLMK_ISA
