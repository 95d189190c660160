#pragma once
// Terms of the divergences and their derivatives, of classes in vectors. What belongs to a row is a number where the vector
// holds classes of one row, and a vector where it holds one class of several rows.
#include <type_traits>

#include "vector.h"
#include "vlmkernels/distillation.h"

namespace vlmk::VLMK_ISA {
namespace {

template <class A>
constexpr A kNothing = -__builtin_inf();

template <class A>
VLMK_INLINE Vec<A> max_of(Vec<A> a, Vec<A> b) {  // b where a is NaN
  return a > b ? a : b;
}

// weight * x, 0 where the weight is 0 whatever x is.
template <class A>
VLMK_INLINE Vec<A> weighted(Vec<A> weight, Vec<A> x) {
  const Vec<A> zero{};
  return weight == zero ? zero : weight * x;
}

// log(1 + low / high) for 0 <= low <= high, as log1p_.
VLMK_INLINE Vec<float> log1p_of(Vec<float> low, Vec<float> high) {
  const Vec<float> s = low / (2.0f * high + low), q = s * s;
  Vec<float> p = q * 1.161952889e-1f + 1.085166071e-1f;
  p = p * q + 1.429629110e-1f;
  p = p * q + 1.999985071e-1f;
  p = p * q + 3.333333367e-1f;
  return 2.0f * s + 2.0f * s * q * p;
}
VLMK_INLINE Vec<double> log1p_of(Vec<double> low, Vec<double> high) {
  Vec<double> out{};
  for (int64_t i = 0; i < Vectors<double>::lanes; ++i) out[i] = std::log1p(low[i] / high[i]);
  return out;
}

inline double scaled(double sum, double factor) { return factor == 0 && sum == sum ? 0 : sum * factor; }

template <class A>
struct Temperature {
  A inverse;
  float factor;  // log2(e) / T; exponentials of x <= 0 are 0 or 1 where it is not in this range

  explicit Temperature(double t)
      : inverse(static_cast<A>(min_(1 / t, sizeof(A) == 4 ? 0x1p127 : 0x1p1000))),
        factor(static_cast<float>(min_(max_(1.4426950408889634 / t, 0x1p-118), 0x1p118))) {}
  // exp(x / T) for x <= 0.
  VLMK_INLINE Vec<float> exp(Vec<float> x) const { return exp_or_zero(x, factor); }
  VLMK_INLINE Vec<double> exp(Vec<double> x) const { return exp_or_zero(x * inverse); }
};

// What is subtracted from logits. Finite: exp((-inf - shift) / T) is 0, not NaN, where no class can be.
template <class A>
A shift_of(A top) {
  return top == kNothing<A> ? A(0) : top;
}

// Takes in another maximum; the factor by which sums shrink that are relative to it.
template <class A>
double raised(A& top, A other, double inv_t) {
  if (!(other > top)) return 1;
  const double keep = top == kNothing<A> ? 0 : std::exp((static_cast<double>(top) - other) * inv_t);
  top = other;
  return keep;
}

// Takes other maxima of the student's and the teacher's logits into the sums of a row.
template <Divergence kForm, bool kOwn, class A>
void raise(RowSums<A>& row, A student, A teacher, const Temperature<A>& t) {
  const double old_s = shift_of(row.student_top), old_p = shift_of(row.teacher_top), old_top = row.student_top;
  const double keep_s = raised(row.student_top, student, t.inverse);
  const double keep_p = kForm == Divergence::none ? 1 : raised(row.teacher_top, teacher, t.inverse);
  if (keep_s == 1 && keep_p == 1) return;
  const double moved = (old_p - shift_of(row.teacher_top)) - (old_s - shift_of(row.student_top));
  if (kForm == Divergence::forward_kl) row.cross = scaled(row.cross + row.teacher * moved, keep_p);
  if (kForm == Divergence::reverse_kl) row.cross = scaled(row.cross - row.student * moved, keep_s);
  row.student = scaled(row.student, keep_s), row.teacher = scaled(row.teacher, keep_p);
  if (kOwn && keep_s != 1) {
    row.hard = scaled(row.hard, old_top == kNothing<A> ? 0 : std::exp(old_top - row.student_top));
  }
}

// The terms of RowSums of some classes.
template <class A>
struct Terms {
  Vec<A> student{}, teacher{}, cross{}, hard{};
};
template <class A>
struct Exponentials {
  Vec<A> student, teacher;
};
template <Divergence kForm, bool kOwn, class A, class S>
VLMK_INLINE Exponentials<A> add_terms(Vec<A> z, Vec<A> q, S student_shift, S teacher_shift, const Temperature<A>& t,
                                      Terms<A>& sums) {
  const Vec<A> x = z - student_shift, s = t.exp(x);
  sums.student += s;
  if constexpr (kOwn) sums.hard += exp_or_zero(x);
  if constexpr (kForm == Divergence::none) {
    return {s, s};
  } else {
    const Vec<A> y = q - teacher_shift, p = t.exp(y);
    sums.teacher += p;
    if constexpr (kForm == Divergence::forward_kl) sums.cross += weighted<A>(p, y - x);
    if constexpr (kForm == Divergence::reverse_kl) sums.cross += weighted<A>(s, x - y);
    return {s, p};
  }
}

// KL(p || s) or KL(s || p) of a row from its sums.
template <Divergence kForm, class A>
double divergence_of(const RowSums<A>& row, const Temperature<A>& t) {
  const double log_sums = std::log(row.teacher) - std::log(row.student);
  if (kForm == Divergence::forward_kl) return row.cross * t.inverse / row.teacher - log_sums;
  if (kForm == Divergence::reverse_kl) return row.cross * t.inverse / row.student + log_sums;
  return 0;
}

// log(s / m) and log(p / m).
template <class A>
struct Ratios {
  Vec<A> s, p;
};
template <class A>
struct Mixture {
  A rest, beta, log_rest, log_beta;

  explicit Mixture(double b)
      : rest(static_cast<A>(1 - b)),
        beta(static_cast<A>(b)),
        log_rest(static_cast<A>(std::log1p(-b))),
        log_beta(static_cast<A>(std::log(b))) {}
  // From the shares of m, a = (1 - beta) s and b = beta p, and log(p / s). Any numbers where the shares are 0.
  VLMK_INLINE Ratios<A> ratios(Vec<A> a, Vec<A> b, Vec<A> log_p_s) const {
    const auto student = a > b;
    const Vec<A> high = student ? a : b, low = student ? b : a, log = log1p_of(low, high);
    const Vec<A> of_s = -(log + log_rest), of_p = -(log + log_beta);
    return {student ? of_s : of_p - log_p_s, student ? of_s + log_p_s : of_p};
  }
};

// Adds the terms of (1 - beta) KL(s || m) and beta KL(p || m). The shares are what the exponentials are multiplied by, log_sums
// the logarithm of the teacher's sum over the student's.
template <class A, class S>
VLMK_INLINE void add_mixed(Vec<A> z, Vec<A> q, S student_shift, S teacher_shift, const Temperature<A>& t, S student_share,
                           S teacher_share, S log_sums, const Mixture<A>& mixture, Vec<A>& of_s, Vec<A>& of_p) {
  const Vec<A> x = z - student_shift, y = q - teacher_shift, a = t.exp(x) * student_share, b = t.exp(y) * teacher_share;
  const Ratios<A> log = mixture.ratios(a, b, (y - x) * t.inverse - log_sums);
  of_s += weighted<A>(a, log.s);
  of_p += weighted<A>(b, log.p);
}

// What the derivatives of a row's loss by its logits depend on.
template <class S>
struct Slope {
  S student_top, student_inverse, teacher_top, teacher_inverse;  // the inverse of the sum
  S mean, log_sums;       // what is subtracted in the brackets of D; log(teacher's sum) - log(student's)
  S soft, hard, inverse;  // u (1 - h) T, u h, the inverse of the student's sum at T = 1
};
// All of it but for -hard at the target. Without a divergence D is s.
template <Divergence kForm, bool kOwn, class A, class S>
VLMK_INLINE Vec<A> slope_of(Vec<A> z, Vec<A> q, const Slope<S>& row, const Temperature<A>& t, const Mixture<A>& mixture) {
  const Vec<A> x = z - row.student_top, s = t.exp(x) * row.student_inverse;
  Vec<A> d = row.soft * s;
  if constexpr (kForm != Divergence::none) {
    const Vec<A> y = q - row.teacher_top, p = t.exp(y) * row.teacher_inverse;
    if constexpr (kForm == Divergence::forward_kl) d = row.soft * (s - p);
    if constexpr (kForm == Divergence::reverse_kl) {
      d = row.soft * weighted<A>(s, (x - y) * t.inverse + (row.log_sums - row.mean));
    }
    if constexpr (kForm == Divergence::jsd) {
      const Vec<A> a = s * mixture.rest;
      const Vec<A> log = mixture.ratios(a, p * mixture.beta, (y - x) * t.inverse - row.log_sums).s;
      d = row.soft * weighted<A>(a, log - row.mean);
    }
  }
  return d + row.hard * (kOwn ? exp_or_zero(x) * row.inverse : s);
}

// Calls f with the divergence, and with whether the cross-entropy has exponentials of its own, as constants.
template <class F>
void with_form(Divergence divergence, bool own, F f) {
  const auto with_own = [&](auto form) { own ? f(form, std::true_type()) : f(form, std::false_type()); };
  switch (divergence) {
    case Divergence::none:
      return with_own(std::integral_constant<Divergence, Divergence::none>());
    case Divergence::forward_kl:
      return with_own(std::integral_constant<Divergence, Divergence::forward_kl>());
    case Divergence::reverse_kl:
      return with_own(std::integral_constant<Divergence, Divergence::reverse_kl>());
    case Divergence::jsd:
      return with_own(std::integral_constant<Divergence, Divergence::jsd>());
  }
}

}  // namespace
}  // namespace vlmk::VLMK_ISA
