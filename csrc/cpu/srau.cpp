#include "vlmkernels/srau.h"

#include "simd.h"

namespace vlmk::VLMK_ISA {
namespace {

constexpr int64_t kCols = 512;  // of a row: their sums over the levels stay in the first cache

// sigmoid(z), its complement, and both with what the threshold cuts set to 0. A NaN stays one.
template <class A>
struct Gate {
  A alpha, rest, a, b;
};

VLMK_INLINE float exp_of_negative(float x) { return x < -87.0f ? 0.0f : exp_(x); }
VLMK_INLINE double exp_of_negative(double x) { return exp_(x); }

template <class A>
VLMK_INLINE Gate<A> gate_of(A z, A tau, A rest_of_tau) {
  const A e = exp_of_negative(z < A(0) ? z : -z), large = A(1) / (A(1) + e), small = e * large;
  const A alpha = z < A(0) ? small : large, rest = z < A(0) ? large : small;
  return {alpha, rest, alpha <= tau ? A(0) : alpha, alpha >= rest_of_tau ? A(0) : rest};
}

template <class T>
void zero(T* to, int64_t count) {
  for (int64_t c = 0; to && c < count; ++c) to[c] = T{};
}

template <class T>
struct Thresholds {
  explicit Thresholds(const SrauInputs<T>& in)
      : sign(in.negated ? -1 : 1),
        tau(static_cast<acc_t<T>>(in.tau)),
        rest(static_cast<acc_t<T>>(1 - in.tau)),
        scale(static_cast<acc_t<T>>(1 / std::sqrt(static_cast<double>(in.levels)))) {}
  acc_t<T> sign, tau, rest, scale;
};

}  // namespace

template <class T>
void srau(const SrauInputs<T>& in, T* out) {
  using A = acc_t<T>;
  const Thresholds<T> by(in);
  A sums[kCols];
  for (int64_t r = 0; r < in.rows; ++r) {
    if (in.row_mask && !in.row_mask[r]) {
      zero(out + r * in.d, in.d);
      continue;
    }
    for (int64_t c0 = 0; c0 < in.d; c0 += kCols) {
      const int64_t cols = min_(kCols, in.d - c0), at = r * in.d + c0;
      const T* heard = in.language + at;
      for (int64_t c = 0; c < cols; ++c) sums[c] = 0;
      for (int64_t l = 0; l < in.levels; ++l) {
        const T *seen = in.visual + l * in.stride + at, *logits = in.gate_logits + l * in.stride + at;
#pragma omp simd
        for (int64_t c = 0; c < cols; ++c) {
          const Gate<A> gate = gate_of(by.sign * to_acc(logits[c]), by.tau, by.rest);
          sums[c] += gate.a * to_acc(heard[c]) + gate.b * to_acc(seen[c]);
        }
      }
      T* to = out + at;
#pragma omp simd
      for (int64_t c = 0; c < cols; ++c) from_acc(by.scale * sums[c], to[c]);
    }
  }
}

template <class T>
void srau_bwd(const T* dout, const SrauInputs<T>& in, T* dlanguage, T* dvisual, T* dgate_logits) {
  using A = acc_t<T>;
  const Thresholds<T> by(in);
  A sums[kCols];
  T unread[kCols];  // takes a gradient that is not needed
  for (int64_t r = 0; r < in.rows; ++r) {
    for (int64_t c0 = 0; c0 < in.d; c0 += kCols) {
      const int64_t cols = min_(kCols, in.d - c0), at = r * in.d + c0;
      const bool masked = in.row_mask && !in.row_mask[r];
      const T *from = dout + at, *heard = in.language + at;
      for (int64_t c = 0; c < cols; ++c) sums[c] = 0;
      for (int64_t l = 0; l < in.levels; ++l) {
        const int64_t at_level = l * in.stride + at;
        const T *seen = in.visual + at_level, *logits = in.gate_logits + at_level;
        T* to_seen = dvisual ? dvisual + at_level : unread;
        T* to_logits = dgate_logits ? dgate_logits + at_level : nullptr;
        if (masked) {
          zero(dvisual ? to_seen : nullptr, cols), zero(to_logits, cols);
        } else if (to_logits) {
#pragma omp simd
          for (int64_t c = 0; c < cols; ++c) {
            const A g = by.scale * to_acc(from[c]);
            const Gate<A> gate = gate_of(by.sign * to_acc(logits[c]), by.tau, by.rest);
            sums[c] += gate.a;
            from_acc(g * gate.b, to_seen[c]);
            const A slope = gate.rest * gate.a * to_acc(heard[c]) - gate.alpha * gate.b * to_acc(seen[c]);
            from_acc(by.sign * g * slope, to_logits[c]);
          }
        } else {
#pragma omp simd
          for (int64_t c = 0; c < cols; ++c) {
            const Gate<A> gate = gate_of(by.sign * to_acc(logits[c]), by.tau, by.rest);
            sums[c] += gate.a;
            from_acc(by.scale * to_acc(from[c]) * gate.b, to_seen[c]);
          }
        }
      }
      T* to = dlanguage ? dlanguage + at : nullptr;
      if (masked) {
        zero(to, cols);
      } else if (to) {
#pragma omp simd
        for (int64_t c = 0; c < cols; ++c) from_acc(by.scale * to_acc(from[c]) * sums[c], to[c]);
      }
    }
  }
}

#define VLMK_INSTANTIATE(T)                     \
  template void srau(const SrauInputs<T>&, T*); \
  template void srau_bwd(const T*, const SrauInputs<T>&, T*, T*, T*);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)
VLMK_INSTANTIATE(f16)

}  // namespace vlmk::VLMK_ISA
