#include "vlmkernels/distillation.h"

#include <type_traits>
#include <utility>

#include "vector.h"

namespace vlmk::VLMK_ISA {
namespace {

// Classes that are taken from memory at once and then lie in the first cache.
constexpr int64_t kPiece = 2048;
template <class A>
constexpr A kNothing = -__builtin_inf();

// Part of a row in the precision of the sums, followed by -inf up to a whole vector.
template <class T>
class Piece {
 public:
  using A = acc_t<T>;
  static constexpr int64_t lanes = Vectors<A>::lanes;

  const A* read(const T* row, int64_t count) {
    if (std::is_same_v<T, A> && count % lanes == 0) return reinterpret_cast<const A*>(row);
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) own_[c] = to_acc(row[c]);
    for (int64_t c = count; c % lanes != 0; ++c) own_[c] = kNothing<A>;
    return own_;
  }
  // Where results for `count` classes of a row are put together before `write` brings them there.
  A* to(T* row, int64_t count) { return std::is_same_v<T, A> && count % lanes == 0 ? reinterpret_cast<A*>(row) : own_; }
  void write(T* row, int64_t count) const {
    if (std::is_same_v<T, A> && count % lanes == 0) return;
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) from_acc(own_[c], row[c]);
  }

 private:
  A own_[kPiece];
};

template <class A>
VLMK_INLINE Vec<A> max_of(Vec<A> a, Vec<A> b) {  // b where a is NaN
  return a > b ? a : b;
}

// The maximum of whole vectors, NaN left out.
template <class A>
A maximum(const A* x, int64_t count) {
  constexpr int64_t lanes = Vectors<A>::lanes;
  const Vec<A> nothing = Vec<A>{} + kNothing<A>;
  Vec<A> top[4] = {nothing, nothing, nothing, nothing};
  int64_t c = 0;
  for (; c + 4 * lanes <= count; c += 4 * lanes) {
    for (int64_t i = 0; i < 4; ++i) top[i] = max_of<A>(load<Vec<A>>(x + c + i * lanes), top[i]);
  }
  for (; c < count; c += lanes) top[0] = max_of<A>(load<Vec<A>>(x + c), top[0]);
  const Vec<A> all = max_of<A>(max_of<A>(top[0], top[1]), max_of<A>(top[2], top[3]));
  A high = kNothing<A>;
  for (int64_t i = 0; i < lanes; ++i) high = max_(high, all[i]);
  return high;
}

template <class A>
VLMK_INLINE double total(Vec<A> x) {
  double sum = 0;
  for (int64_t i = 0; i < Vectors<A>::lanes; ++i) sum += x[i];
  return sum;
}

// weight * x, 0 where the weight is 0 whatever x is.
template <class A>
VLMK_INLINE Vec<A> weighted(Vec<A> weight, Vec<A> x) {
  const Vec<A> zero{};
  return weight == zero ? zero : weight * x;
}

// log(1 + e) for 0 <= e <= 1, as log1p_.
VLMK_INLINE Vec<float> log1p_of(Vec<float> e) {
  const Vec<float> s = e / (2.0f + e), q = s * s;
  Vec<float> p = q * 1.161952889e-1f + 1.085166071e-1f;
  p = p * q + 1.429629110e-1f;
  p = p * q + 1.999985071e-1f;
  p = p * q + 3.333333367e-1f;
  return 2.0f * s + 2.0f * s * q * p;
}
VLMK_INLINE Vec<double> log1p_of(Vec<double> e) {
  Vec<double> out{};
  for (int i = 0; i < 8; ++i) out[i] = std::log1p(e[i]);
  return out;
}

double scaled(double sum, double factor) { return factor == 0 && sum == sum ? 0 : sum * factor; }

// The sum of exp((x - top) / T) over the classes of a row that were read.
template <class A>
struct Softmax {
  A top = kNothing<A>;
  double sum = 0;

  // Finite: exp((-inf - shift) / T) is 0, not NaN, where no class can be.
  A shift() const { return top == kNothing<A> ? A(0) : top; }
  // Takes in another maximum; the factor by which sums shrink that are relative to it.
  double raise(A other, double inv_t) {
    if (!(other > top)) return 1;
    const double keep = top == kNothing<A> ? 0 : std::exp((static_cast<double>(top) - other) * inv_t);
    top = other;
    return keep;
  }
};

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
    const Vec<A> high = student ? a : b, low = student ? b : a, log = log1p_of(low / high);
    const Vec<A> of_s = -(log + log_rest), of_p = -(log + log_beta);
    return {student ? of_s : of_p - log_p_s, student ? of_s + log_p_s : of_p};
  }
};

template <class T>
acc_t<T> inverse_temperature(const Distillation<T>& g) {
  const double most = sizeof(acc_t<T>) == 4 ? 0x1p127 : 0x1p1023;  // (x - maximum) / T is 0 at the maximum
  return static_cast<acc_t<T>>(min_(1 / g.temperature, most));
}

template <class T>
bool counts(const Distillation<T>& g, int64_t row) {
  return g.classes > 0 && (!g.target || g.target[row] != g.ignore_index);
}

// Sums of one piece of a row. `cross` is that of exp(x) (x - y), x being the first argument of KL; x and y are (logit - shift)
// / T.
struct Sums {
  double student = 0, teacher = 0, cross = 0, hard = 0;
};

template <Divergence kForm, bool kOwn, class T>
Sums sums_of(const acc_t<T>* z, const acc_t<T>* q, int64_t count, acc_t<T> student_shift, acc_t<T> teacher_shift,
             acc_t<T> inv_t, const T* next_student, const T* next_teacher) {
  using A = acc_t<T>;
  constexpr int64_t lanes = Vectors<A>::lanes;
  Vec<A> student{}, teacher{}, cross{}, hard{};
  for (int64_t c0 = 0; c0 < count; c0 += kSumRows * lanes) {
    Vec<A> student_part{}, teacher_part{}, cross_part{}, hard_part{};
    for (int64_t c = c0; c < min_(c0 + kSumRows * lanes, count); c += lanes) {
      __builtin_prefetch(next_student + c);
      const Vec<A> above = load<Vec<A>>(z + c) - student_shift, a = above * inv_t, s = exp_or_zero(a);
      student_part += s;
      if constexpr (kOwn) hard_part += exp_or_zero(above);
      if constexpr (kForm != Divergence::none) {
        __builtin_prefetch(next_teacher + c);
        const Vec<A> b = (load<Vec<A>>(q + c) - teacher_shift) * inv_t, p = exp_or_zero(b);
        teacher_part += p;
        if constexpr (kForm == Divergence::forward_kl) cross_part += weighted<A>(p, b - a);
        if constexpr (kForm == Divergence::reverse_kl) cross_part += weighted<A>(s, a - b);
      }
    }
    student += student_part, teacher += teacher_part, cross += cross_part, hard += hard_part;
  }
  return {total<A>(student), total<A>(teacher), total<A>(cross), total<A>(hard)};
}

// Of one row: (1 - beta) KL(s || m) and beta KL(p || m), from the sums of its softmaxes.
template <class T>
std::pair<double, double> jsd_parts(const Distillation<T>& g, const T* student, const T* teacher,
                                    const Softmax<acc_t<T>>& s_row, const Softmax<acc_t<T>>& p_row) {
  using A = acc_t<T>;
  constexpr int64_t lanes = Vectors<A>::lanes;
  const Mixture<A> mixture(g.beta);
  const A inv_t = inverse_temperature(g), log_sums = static_cast<A>(std::log(p_row.sum) - std::log(s_row.sum));
  const A share_s = (1 - g.beta) / s_row.sum, share_p = g.beta / p_row.sum;
  Piece<T> student_piece, teacher_piece;
  double of_s = 0, of_p = 0;
  for (int64_t first = 0; first < g.classes; first += kPiece) {
    const int64_t count = min_(kPiece, g.classes - first);
    const A *z = student_piece.read(student + first, count), *q = teacher_piece.read(teacher + first, count);
    Vec<A> sum_s{}, sum_p{};
    for (int64_t c0 = 0; c0 < count; c0 += kSumRows * lanes) {
      Vec<A> some_s{}, some_p{};
      for (int64_t c = c0; c < min_(c0 + kSumRows * lanes, count); c += lanes) {
        const Vec<A> x = (load<Vec<A>>(z + c) - s_row.shift()) * inv_t, y = (load<Vec<A>>(q + c) - p_row.shift()) * inv_t;
        const Vec<A> a = exp_or_zero(x) * share_s, b = exp_or_zero(y) * share_p;
        const Ratios<A> log = mixture.ratios(a, b, (y - x) - log_sums);
        some_s += weighted<A>(a, log.s);
        some_p += weighted<A>(b, log.p);
      }
      sum_s += some_s, sum_p += some_p;
    }
    of_s += total<A>(sum_s), of_p += total<A>(sum_p);
  }
  return {of_s, of_p};
}

template <Divergence kForm, bool kOwn, class T>
double row_loss(const Distillation<T>& g, int64_t row) {
  using A = acc_t<T>;
  constexpr int64_t lanes = Vectors<A>::lanes;
  constexpr bool two = kForm != Divergence::none, reverse = kForm == Divergence::reverse_kl;
  A* stats = g.stats + row * g.kStats;
  for (int64_t i = 0; i < g.kStats; ++i) stats[i] = 0;
  if (!counts(g, row)) return 0;
  const T *student = g.student + row * g.student_stride, *teacher = two ? g.teacher + row * g.teacher_stride : nullptr;
  const A inv_t = inverse_temperature(g);
  Piece<T> student_piece, teacher_piece;
  Softmax<A> s, p;
  double cross = 0, hard = 0;
  for (int64_t first = 0; first < g.classes; first += kPiece) {
    const int64_t count = min_(kPiece, g.classes - first), whole = (count + lanes - 1) / lanes * lanes;
    const A *z = student_piece.read(student + first, count), *q = two ? teacher_piece.read(teacher + first, count) : nullptr;
    const double old_s = s.shift(), old_p = p.shift(), old_top = s.top;
    const double keep_s = s.raise(maximum(z, whole), inv_t), keep_p = two ? p.raise(maximum(q, whole), inv_t) : 1;
    if (keep_s != 1 || keep_p != 1) {
      const double moved = ((old_p - p.shift()) - (old_s - s.shift())) * inv_t;
      cross = reverse ? scaled(cross - s.sum * moved, keep_s) : scaled(cross + p.sum * moved, keep_p);
      s.sum = scaled(s.sum, keep_s), p.sum = scaled(p.sum, keep_p);
      if (kOwn && keep_s != 1) hard = scaled(hard, old_top == kNothing<A> ? 0 : std::exp(old_top - s.top));
    }
    const Sums sums = sums_of<kForm, kOwn, T>(z, q, whole, s.shift(), p.shift(), inv_t, student + first + kPiece,
                                              two ? teacher + first + kPiece : nullptr);
    s.sum += sums.student, p.sum += sums.teacher, cross += sums.cross, hard += sums.hard;
  }
  if (!kOwn) hard = s.sum;
  double divergence = 0, mean = 0;
  if (kForm == Divergence::forward_kl) divergence = cross / p.sum + (std::log(s.sum) - std::log(p.sum));
  if (reverse) mean = divergence = cross / s.sum + (std::log(p.sum) - std::log(s.sum));
  if constexpr (kForm == Divergence::jsd) {
    const auto [of_s, of_p] = jsd_parts(g, student, teacher, s, p);
    divergence = of_s + of_p, mean = of_s / (1 - g.beta);
  }
  const double values[] = {s.top, s.sum, p.top, p.sum, mean, hard};
  for (int64_t i = 0; i < g.kStats; ++i) stats[i] = static_cast<A>(values[i]);
  double loss = two ? (1 - g.hard_weight) * g.temperature * (g.temperature * divergence) : 0;
  if (g.hard_weight > 0) {
    const double logit = to_acc(student[g.target[row]]);
    loss += g.hard_weight * (std::log(hard) - (logit - s.top));
  }
  return loss;
}

template <Divergence kForm, bool kOwn, class T>
void row_gradient(const Distillation<T>& g, int64_t row, double u, T* out) {
  using A = acc_t<T>;
  constexpr int64_t lanes = Vectors<A>::lanes;
  constexpr bool two = kForm != Divergence::none;
  if (!counts(g, row)) {
    for (int64_t c = 0; c < g.classes; ++c) out[c] = T{};
    return;
  }
  const T *student = g.student + row * g.student_stride, *teacher = two ? g.teacher + row * g.teacher_stride : nullptr;
  const A* stats = g.stats + row * g.kStats;
  const A top_s = stats[0], top_p = stats[2], mean = stats[4], inv_t = inverse_temperature(g);
  const double sum_s = stats[1], sum_p = stats[3];
  const A inv_s = static_cast<A>(1 / sum_s), inv_p = static_cast<A>(1 / sum_p), inv_hard = static_cast<A>(1 / double(stats[5]));
  const A log_sums = static_cast<A>(std::log(sum_p) - std::log(sum_s));
  const A soft = static_cast<A>(u * (1 - g.hard_weight) * g.temperature), hard = static_cast<A>(u * g.hard_weight);
  const Mixture<A> mixture(g.beta);
  const int64_t target = g.hard_weight > 0 ? g.target[row] : -1;
  Piece<T> student_piece, teacher_piece, out_piece;
  for (int64_t first = 0; first < g.classes; first += kPiece) {
    const int64_t count = min_(kPiece, g.classes - first);
    const A *z = student_piece.read(student + first, count), *q = two ? teacher_piece.read(teacher + first, count) : nullptr;
    A* to = out_piece.to(out + first, count);
    for (int64_t c = 0; c < count; c += lanes) {
      __builtin_prefetch(student + first + kPiece + c);
      const Vec<A> above = load<Vec<A>>(z + c) - top_s, x = above * inv_t, s = exp_or_zero(x) * inv_s;
      Vec<A> d{};
      if constexpr (two) {
        __builtin_prefetch(teacher + first + kPiece + c);
        const Vec<A> y = (load<Vec<A>>(q + c) - top_p) * inv_t, p = exp_or_zero(y) * inv_p;
        if constexpr (kForm == Divergence::forward_kl) d = soft * (s - p);
        if constexpr (kForm == Divergence::reverse_kl) d = soft * weighted<A>(s, (x - y) + (log_sums - mean));
        if constexpr (kForm == Divergence::jsd) {
          const Vec<A> a = s * mixture.rest, log = mixture.ratios(a, p * mixture.beta, (y - x) - log_sums).s;
          d = soft * weighted<A>(a, log - mean);
        }
      }
      store(d + hard * (kOwn ? exp_or_zero(above) * inv_hard : s), to + c);
    }
    if (target >= first && target < first + count) to[target - first] -= hard;
    out_piece.write(out + first, count);
  }
}

// Calls f with the divergence, and with whether the cross-entropy has exponentials of its own, as constants.
template <class T, class F>
void with_form(const Distillation<T>& g, F f) {
  const auto with_own = [&](auto form) {
    if (g.hard_weight > 0 && g.temperature != 1) {
      f(form, std::true_type());
    } else {
      f(form, std::false_type());
    }
  };
  switch (g.divergence) {
    case Divergence::none:
      return f(std::integral_constant<Divergence, Divergence::none>(), std::false_type());
    case Divergence::forward_kl:
      return with_own(std::integral_constant<Divergence, Divergence::forward_kl>());
    case Divergence::reverse_kl:
      return with_own(std::integral_constant<Divergence, Divergence::reverse_kl>());
    case Divergence::jsd:
      return with_own(std::integral_constant<Divergence, Divergence::jsd>());
  }
}

}  // namespace

template <class T>
void distillation(const Distillation<T>& g, int64_t first, int64_t last, acc_t<T>* loss) {
  with_form(g, [&](auto form, auto own) {
    for (int64_t row = first; row < last; ++row) loss[row] = static_cast<acc_t<T>>(row_loss<form.value, own.value>(g, row));
  });
}

template <class T>
void distillation_bwd(const Distillation<T>& g, int64_t first, int64_t last, const acc_t<T>* dloss, bool one, double factor,
                      T* dstudent) {
  with_form(g, [&](auto form, auto own) {
    for (int64_t row = first; row < last; ++row) {
      row_gradient<form.value, own.value>(g, row, factor * dloss[one ? 0 : row], dstudent + row * g.classes);
    }
  });
}

#define VLMK_INSTANTIATE(T)                                                        \
  template void distillation(const Distillation<T>&, int64_t, int64_t, acc_t<T>*); \
  template void distillation_bwd(const Distillation<T>&, int64_t, int64_t, const acc_t<T>*, bool, double, T*);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)
VLMK_INSTANTIATE(f16)

}  // namespace vlmk::VLMK_ISA
