#include "distillation.h"

#include <utility>

namespace vlmk::VLMK_ISA {
namespace {

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

template <class T>
bool counts(const Distillation<T>& g, int64_t row) {
  return g.classes > 0 && (!g.target || g.target[row] != g.ignore_index);
}

// Adds the sums of one piece of a row; its exponentials, of whole vectors, to `keep_s` and `keep_p` if kKeep.
template <Divergence kForm, bool kOwn, bool kKeep, class T>
void add_piece(const acc_t<T>* z, const acc_t<T>* q, int64_t count, const Temperature<acc_t<T>>& t, const T* next_student,
               const T* next_teacher, acc_t<T>* keep_s, acc_t<T>* keep_p, RowSums<acc_t<T>>& row) {
  using A = acc_t<T>;
  constexpr int64_t lanes = Vectors<A>::lanes;
  const A student_shift = shift_of(row.student_top), teacher_shift = shift_of(row.teacher_top);
  Terms<A> sums;
  for (int64_t c0 = 0; c0 < count; c0 += kSumRows * lanes) {
    Terms<A> part;
    for (int64_t c = c0; c < min_(c0 + kSumRows * lanes, count); c += lanes) {
      __builtin_prefetch(next_student + c);
      Vec<A> teacher{};
      if constexpr (kForm != Divergence::none) __builtin_prefetch(next_teacher + c), teacher = load<Vec<A>>(q + c);
      const auto e = add_terms<kForm, kOwn, A>(load<Vec<A>>(z + c), teacher, student_shift, teacher_shift, t, part);
      if constexpr (kKeep) store(e.student, keep_s + c);
      if constexpr (kKeep && kForm != Divergence::none) store(e.teacher, keep_p + c);
    }
    sums.student += part.student, sums.teacher += part.teacher, sums.cross += part.cross, sums.hard += part.hard;
  }
  row.student += total<A>(sums.student), row.teacher += total<A>(sums.teacher);
  row.cross += total<A>(sums.cross), row.hard += total<A>(sums.hard);
}

// Of one row: (1 - beta) KL(s || m) and beta KL(p || m), from the sums of its softmaxes.
template <class T>
std::pair<double, double> jsd_parts(const Distillation<T>& g, const T* student, const T* teacher,
                                    const RowSums<acc_t<T>>& row) {
  using A = acc_t<T>;
  constexpr int64_t lanes = Vectors<A>::lanes;
  const Mixture<A> mixture(g.beta);
  const Temperature<A> t(g.temperature);
  const A log_sums = static_cast<A>(std::log(row.teacher) - std::log(row.student));
  const A student_shift = shift_of(row.student_top), teacher_shift = shift_of(row.teacher_top);
  const A student_share = (1 - g.beta) / row.student, teacher_share = g.beta / row.teacher;
  Piece<T> student_piece, teacher_piece;
  double of_s = 0, of_p = 0;
  for (int64_t first = 0; first < g.classes; first += kPiece) {
    const int64_t count = min_(kPiece, g.classes - first);
    const A *z = student_piece.read(student + first, count), *q = teacher_piece.read(teacher + first, count);
    Vec<A> sum_s{}, sum_p{};
    for (int64_t c0 = 0; c0 < count; c0 += kSumRows * lanes) {
      Vec<A> some_s{}, some_p{};
      for (int64_t c = c0; c < min_(c0 + kSumRows * lanes, count); c += lanes) {
        add_mixed<A>(load<Vec<A>>(z + c), load<Vec<A>>(q + c), student_shift, teacher_shift, t, student_share, teacher_share,
                     log_sums, mixture, some_s, some_p);
      }
      sum_s += some_s, sum_p += some_p;
    }
    of_s += total<A>(sum_s), of_p += total<A>(sum_p);
  }
  return {of_s, of_p};
}

// What exponentials relative to `shift` are multiplied by to be relative to `top`.
template <class A>
double moved(A shift, A top, double inv_t) {
  return std::exp((static_cast<double>(shift) - top) * inv_t);
}

// As jsd_parts, from the exponentials, which become (1 - beta) s and log(s / m).
template <class T>
std::pair<double, double> kept_jsd_parts(const Distillation<T>& g, const T* student, const T* teacher,
                                         const RowSums<acc_t<T>>& row, const KeptRow<acc_t<T>>& kept) {
  using A = acc_t<T>;
  constexpr int64_t lanes = Vectors<A>::lanes;
  const Mixture<A> mixture(g.beta);
  const Temperature<A> t(g.temperature);
  const A student_shift = shift_of(row.student_top), teacher_shift = shift_of(row.teacher_top);
  const A log_ratio = static_cast<A>(std::log(row.teacher) - std::log(row.student));
  Piece<T> student_piece, teacher_piece;
  double of_s = 0, of_p = 0;
  for (int64_t first = 0; first < g.classes; first += kPiece) {
    const int64_t count = min_(kPiece, g.classes - first), piece = first / kPiece;
    const A *z = student_piece.read(student + first, count), *q = teacher_piece.read(teacher + first, count);
    A *keep_s = kept.student + first, *keep_p = kept.teacher + first;
    const A share_s = static_cast<A>((1 - g.beta) / row.student * moved(kept.student_shift[piece], student_shift, t.inverse));
    const A share_p = static_cast<A>(g.beta / row.teacher * moved(kept.teacher_shift[piece], teacher_shift, t.inverse));
    Vec<A> sum_s{}, sum_p{};
    for (int64_t c0 = 0; c0 < count; c0 += kSumRows * lanes) {
      Vec<A> some_s{}, some_p{};
      for (int64_t c = c0; c < min_(c0 + kSumRows * lanes, count); c += lanes) {
        const Vec<A> x = load<Vec<A>>(z + c) - student_shift, y = load<Vec<A>>(q + c) - teacher_shift;
        const Vec<A> a = load<Vec<A>>(keep_s + c) * share_s, b = load<Vec<A>>(keep_p + c) * share_p;
        const Ratios<A> log = mixture.ratios(a, b, (y - x) * t.inverse - log_ratio);
        some_s += weighted<A>(a, log.s), some_p += weighted<A>(b, log.p);
        store(a, keep_s + c), store(log.s, keep_p + c);
      }
      sum_s += some_s, sum_p += some_p;
    }
    of_s += total<A>(sum_s), of_p += total<A>(sum_p);
  }
  return {of_s, of_p};
}

template <Divergence kForm, bool kOwn, bool kKeep, class T>
double row_loss(const Distillation<T>& g, int64_t index, const KeptRow<acc_t<T>>* kept = nullptr) {
  using A = acc_t<T>;
  constexpr int64_t lanes = Vectors<A>::lanes;
  constexpr bool two = kForm != Divergence::none;
  A* stats = g.stats + index * g.kStats;
  for (int64_t i = 0; i < g.kStats; ++i) stats[i] = 0;
  if (!counts(g, index)) return 0;
  const T *student = g.student + index * g.student_stride, *teacher = two ? g.teacher + index * g.teacher_stride : nullptr;
  const Temperature<A> t(g.temperature);
  Piece<T> student_piece, teacher_piece;
  RowSums<A> row;
  for (int64_t first = 0; first < g.classes; first += kPiece) {
    const int64_t count = min_(kPiece, g.classes - first), whole = (count + lanes - 1) / lanes * lanes;
    const A *z = student_piece.read(student + first, count), *q = two ? teacher_piece.read(teacher + first, count) : nullptr;
    raise<kForm, kOwn>(row, maximum(z, whole), two ? maximum(q, whole) : kNothing<A>, t);
    A *keep_s = nullptr, *keep_p = nullptr;
    if constexpr (kKeep) {
      keep_s = kept->student + first, keep_p = kept->teacher + first;
      kept->student_shift[first / kPiece] = shift_of(row.student_top);
      kept->teacher_shift[first / kPiece] = shift_of(row.teacher_top);
    }
    add_piece<kForm, kOwn, kKeep, T>(z, q, whole, t, student + first + kPiece, two ? teacher + first + kPiece : nullptr, keep_s,
                                     keep_p, row);
  }
  if (!kOwn) row.hard = row.student;
  double divergence = divergence_of<kForm>(row, t), mean = kForm == Divergence::reverse_kl ? divergence : 0;
  if constexpr (kForm == Divergence::jsd) {
    const auto [of_s, of_p] = kKeep ? kept_jsd_parts(g, student, teacher, row, *kept) : jsd_parts(g, student, teacher, row);
    divergence = of_s + of_p, mean = of_s / (1 - g.beta);
  }
  const double values[] = {row.student_top, row.student, row.teacher_top, row.teacher, mean, row.hard};
  for (int64_t i = 0; i < g.kStats; ++i) stats[i] = static_cast<A>(values[i]);
  double loss = two ? (1 - g.hard_weight) * g.temperature * (g.temperature * divergence) : 0;
  if (g.hard_weight > 0) {
    const double logit = to_acc(student[g.target[index]]);
    loss += g.hard_weight * (std::log(row.hard) - (logit - row.student_top));
  }
  return loss;
}

// Of row `index`, from its stats; u is the incoming gradient.
template <class T>
Slope<acc_t<T>> slope_at(const Distillation<T>& g, int64_t index, double u) {
  using A = acc_t<T>;
  const A* stats = g.stats + index * g.kStats;
  const double sum_s = stats[1], sum_p = stats[3];
  return {stats[0],
          static_cast<A>(1 / sum_s),
          stats[2],
          static_cast<A>(1 / sum_p),
          stats[4],
          static_cast<A>(std::log(sum_p) - std::log(sum_s)),
          static_cast<A>(u * (1 - g.hard_weight) * g.temperature),
          static_cast<A>(u * g.hard_weight),
          static_cast<A>(1 / double(stats[5]))};
}

template <class T>
void no_gradient(const Distillation<T>& g, T* out) {
  for (int64_t c = 0; c < g.classes; ++c) out[c] = T{};
}

template <Divergence kForm, bool kOwn, class T>
void row_gradient(const Distillation<T>& g, int64_t index, double u, T* out) {
  using A = acc_t<T>;
  constexpr int64_t lanes = Vectors<A>::lanes;
  constexpr bool two = kForm != Divergence::none;
  if (!counts(g, index)) return no_gradient(g, out);
  const T *student = g.student + index * g.student_stride, *teacher = two ? g.teacher + index * g.teacher_stride : nullptr;
  const Temperature<A> t(g.temperature);
  const Slope<A> row = slope_at(g, index, u);
  const Mixture<A> mixture(g.beta);
  const int64_t target = g.hard_weight > 0 ? g.target[index] : -1;
  Piece<T> student_piece, teacher_piece, out_piece;
  for (int64_t first = 0; first < g.classes; first += kPiece) {
    const int64_t count = min_(kPiece, g.classes - first);
    const A *z = student_piece.read(student + first, count), *q = two ? teacher_piece.read(teacher + first, count) : nullptr;
    A* to = out_piece.to(out + first, count);
    for (int64_t c = 0; c < count; c += lanes) {
      __builtin_prefetch(student + first + kPiece + c);
      Vec<A> taught{};
      if constexpr (two) __builtin_prefetch(teacher + first + kPiece + c), taught = load<Vec<A>>(q + c);
      store(slope_of<kForm, kOwn, A>(load<Vec<A>>(z + c), taught, row, t, mixture), to + c);
    }
    if (target >= first && target < first + count) to[target - first] -= row.hard;
    out_piece.write(out + first, count);
  }
}

// As row_gradient, from the exponentials that row_loss kept.
template <Divergence kForm, bool kOwn, class T>
void kept_gradient(const Distillation<T>& g, int64_t index, double u, const KeptRow<acc_t<T>>& kept, T* out) {
  using A = acc_t<T>;
  constexpr int64_t lanes = Vectors<A>::lanes;
  constexpr bool reverse = kForm == Divergence::reverse_kl, jsd = kForm == Divergence::jsd;
  if (!counts(g, index)) return no_gradient(g, out);
  const T *student = g.student + index * g.student_stride, *teacher = reverse ? g.teacher + index * g.teacher_stride : nullptr;
  const Temperature<A> t(g.temperature);
  const Slope<A> row = slope_at(g, index, u);
  const A hard = static_cast<A>(row.hard / (jsd ? 1 - g.beta : 1));
  const int64_t target = g.hard_weight > 0 ? g.target[index] : -1;
  Piece<T> student_piece, teacher_piece, out_piece;
  for (int64_t first = 0; first < g.classes; first += kPiece) {
    const int64_t count = min_(kPiece, g.classes - first), piece = first / kPiece;
    const A* z = kOwn || reverse ? student_piece.read(student + first, count) : nullptr;
    const A* q = reverse ? teacher_piece.read(teacher + first, count) : nullptr;
    const A *keep_s = kept.student + first, *keep_p = kept.teacher + first;
    const A by_s =
        jsd ? A(1) : static_cast<A>(row.student_inverse * moved(kept.student_shift[piece], row.student_top, t.inverse));
    const A by_p = static_cast<A>(row.teacher_inverse * moved(kept.teacher_shift[piece], row.teacher_top, t.inverse));
    A* to = out_piece.to(out + first, count);
    for (int64_t c = 0; c < count; c += lanes) {
      const Vec<A> s = load<Vec<A>>(keep_s + c) * by_s;
      Vec<A> d = row.soft * s;
      if constexpr (kForm == Divergence::forward_kl) d = row.soft * (s - load<Vec<A>>(keep_p + c) * by_p);
      if constexpr (reverse) {
        const Vec<A> x = load<Vec<A>>(z + c) - row.student_top, y = load<Vec<A>>(q + c) - row.teacher_top;
        d = row.soft * weighted<A>(s, (x - y) * t.inverse + (row.log_sums - row.mean));
      }
      if constexpr (jsd) d = row.soft * weighted<A>(s, load<Vec<A>>(keep_p + c) - row.mean);
      if constexpr (kOwn) {
        d += row.hard * (exp_or_zero(load<Vec<A>>(z + c) - row.student_top) * row.inverse);
      } else {
        d += hard * s;
      }
      store(d, to + c);
    }
    if (target >= first && target < first + count) to[target - first] -= row.hard;
    out_piece.write(out + first, count);
  }
}

}  // namespace

template <class T>
void distillation(const Distillation<T>& g, int64_t first, int64_t last, acc_t<T>* loss) {
  with_form(g.divergence, g.hard_weight > 0 && g.temperature != 1, [&](auto form, auto own) {
    for (int64_t row = first; row < last; ++row) {
      loss[row] = static_cast<acc_t<T>>(row_loss<form.value, own.value, false>(g, row));
    }
  });
}

template <class T>
void distillation_formed(const Distillation<T>& g, int64_t first, int64_t last, acc_t<T>* loss, double factor, T* dstudent,
                         const KeptRow<acc_t<T>>& kept) {
  using A = acc_t<T>;
  with_form(g.divergence, g.hard_weight > 0 && g.temperature != 1, [&](auto form, auto own) {
    for (int64_t row = first; row < last; ++row) {
      loss[row] = static_cast<A>(row_loss<form.value, own.value, true>(g, row, &kept));
      kept_gradient<form.value, own.value>(g, row, factor, kept, dstudent + row * g.classes);
    }
  });
}

template <class T>
void distillation_bwd(const Distillation<T>& g, int64_t first, int64_t last, const acc_t<T>* dloss, bool one, double factor,
                      T* dstudent) {
  with_form(g.divergence, g.hard_weight > 0 && g.temperature != 1, [&](auto form, auto own) {
    for (int64_t row = first; row < last; ++row) {
      row_gradient<form.value, own.value>(g, row, factor * dloss[one ? 0 : row], dstudent + row * g.classes);
    }
  });
}

#define VLMK_INSTANTIATE(T)                                                                          \
  template void distillation(const Distillation<T>&, int64_t, int64_t, acc_t<T>*);                   \
  template void distillation_formed(const Distillation<T>&, int64_t, int64_t, acc_t<T>*, double, T*, \
                                    const KeptRow<acc_t<T>>&);                                       \
  template void distillation_bwd(const Distillation<T>&, int64_t, int64_t, const acc_t<T>*, bool, double, T*);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)
VLMK_INSTANTIATE(f16)

}  // namespace vlmk::VLMK_ISA
