#include "vlmkernels/linear_distillation.h"

#include "distillation.h"
#include "pairwise.h"

namespace vlmk::VLMK_ISA {
namespace {

constexpr int64_t kStrips = 2;  // vectors of rows that a loop over classes works on at once
template <class A>
constexpr int64_t kStrip = kStrips * Vectors<A>::lanes;

// Columns that loops over whole strips go through; those past the last row hold numbers that nobody uses.
template <class P>
int64_t strips_of(const Pairs<P>& p, int64_t jb) {
  return round_up(cols_of(p, jb), kStrip<acc_t<P>>);
}

// Calls f with the divergence as a constant, and with whether the cross-entropy has exponentials of its own: with an offline
// teacher the others are those of its other classes alone.
template <class P, class F>
void with_form(const LinearDistillation<P>& g, F f) {
  with_form(g.divergence, g.hard_weight > 0 && (g.temperature != 1 || g.k >= 0), f);
}

// Adds the bias of the classes to the products of a tile and takes in the maxima over its classes.
template <class A>
void add_bias(const A* bias, int64_t rows, int64_t cols, A* x, A* top) {
  for (int64_t r = 0; r < rows; ++r) {
    const A b = bias ? bias[r] : A(0);
    A* row = x + r * kTileCols;
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      const A y = row[c] + b;
      row[c] = y;
      top[c] = max_(y, top[c]);
    }
  }
}

// The first of the ascending indices that is `least` or more.
inline int64_t first_from(const int64_t* indices, int64_t count, int64_t least) {
  int64_t low = 0;
  while (low < count) {
    const int64_t middle = (low + count) / 2;
    if (indices[middle] < least) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

// f(number of the tile, number of the entry in [N][k]) for the classes of an offline teacher in block ib of classes.
template <class P, class F>
void for_entries(const LinearDistillation<P>& g, int64_t ib, int64_t jb, acc_t<P>* tile, F f) {
  const int64_t j0 = ib * kTileRows, j1 = j0 + rows_of(g.student.pairs, ib);
  for (int64_t c = 0; g.k > 0 && c < cols_of(g.student.pairs, jb); ++c) {
    const int64_t row = (jb * kTileCols + c) * g.k, *indices = g.indices + row;
    for (int64_t e = first_from(indices, g.k, j0); e < g.k && indices[e] < j1; ++e) {
      f(tile[(indices[e] - j0) * kTileCols + c], row + e);
    }
  }
}

template <class A>
void add_up(const Vec<A>& part, double* sums) {
  constexpr int64_t lanes = Vectors<A>::lanes;
  A x[lanes];
  store(part, x);
#pragma omp simd
  for (int64_t i = 0; i < lanes; ++i) sums[i] += x[i];
}

// Adds the sums over the classes of a tile.
template <Divergence kForm, bool kOwn, class A>
void add_tile(const A* z, const A* q, int64_t rows, int64_t cols, const Temperature<A>& t, RowSums<A>* sums) {
  constexpr int64_t lanes = Vectors<A>::lanes;
  for (int64_t c0 = 0; c0 < cols; c0 += kStrip<A>) {
    A student_shift[kStrip<A>], teacher_shift[kStrip<A>];
    double student[kStrip<A>] = {}, teacher[kStrip<A>] = {}, cross[kStrip<A>] = {}, hard[kStrip<A>] = {};
    for (int64_t i = 0; i < kStrip<A>; ++i) {
      student_shift[i] = shift_of(sums[c0 + i].student_top), teacher_shift[i] = shift_of(sums[c0 + i].teacher_top);
    }
    for (int64_t r0 = 0; r0 < rows; r0 += kSumRows) {
      Terms<A> part[kStrips];
      for (int64_t r = r0; r < min_(r0 + kSumRows, rows); ++r) {
        for (int64_t i = 0; i < kStrips; ++i) {
          const int64_t at = r * kTileCols + c0 + i * lanes;
          Vec<A> taught{};
          if constexpr (kForm != Divergence::none) taught = load<Vec<A>>(q + at);
          add_terms<kForm, kOwn, A>(load<Vec<A>>(z + at), taught, load<Vec<A>>(student_shift + i * lanes),
                                    load<Vec<A>>(teacher_shift + i * lanes), t, part[i]);
        }
      }
      for (int64_t i = 0; i < kStrips; ++i) {
        add_up<A>(part[i].student, student + i * lanes);
        if constexpr (kForm != Divergence::none) add_up<A>(part[i].teacher, teacher + i * lanes);
        if constexpr (kForm == Divergence::forward_kl || kForm == Divergence::reverse_kl) {
          add_up<A>(part[i].cross, cross + i * lanes);
        }
        if constexpr (kOwn) add_up<A>(part[i].hard, hard + i * lanes);
      }
    }
    for (int64_t i = 0; i < kStrip<A>; ++i) {
      RowSums<A>& row = sums[c0 + i];
      row.student += student[i], row.teacher += teacher[i], row.cross += cross[i], row.hard += hard[i];
    }
  }
}

}  // namespace

template <class P, class Q>
void linear_distillation_logits(const LinearDistillation<P>& g, const Pairs<Q>& teacher, int64_t class_chunk, int64_t jb,
                                acc_t<P>* scratch) {
  using A = acc_t<P>;
  const LinearCrossEntropy<P>& s = g.student;
  const Pairs<P>& p = s.pairs;
  const int64_t i0 = jb * kTileCols, cols = cols_of(p, jb), whole = strips_of(p, jb);
  const int64_t ib0 = class_chunk * s.chunk_classes, ib1 = min_(ib0 + s.chunk_classes, p.row_blocks());
  const Temperature<A> t(g.temperature);
  RowSums<A>* sums = g.sums + class_chunk * g.rows() + i0 - s.first * kTileCols;
  for (int64_t c = 0; c < whole; ++c) sums[c] = {};
  A student_top[kTileCols], teacher_top[kTileCols];
  with_form(g, [&](auto form, auto own) {
    for (int64_t ib = ib0; ib < ib1; ++ib) {
      A* z = s.tiles ? s.logits(ib, jb) : scratch;
      A* q = g.teacher_tiles ? g.teacher_logits(ib, jb) : scratch + kTileSize;
      const int64_t rows = rows_of(p, ib), j0 = ib * kTileRows;
      for (int64_t c = 0; c < whole; ++c) student_top[c] = teacher_top[c] = kNothing<A>;
      if constexpr (form.value != Divergence::none) {
        similarities(teacher, ib, jb, q);
        add_bias(g.teacher_bias ? g.teacher_bias + j0 : nullptr, rows, whole, q, teacher_top);
      }
      similarities(p, ib, jb, z);
      const auto bias = [&](int64_t j) { return s.bias ? s.bias[j] : A(0); };
      for (int64_t c = 0; g.hard_weight > 0 && c < cols; ++c) {
        const int64_t r = s.target[i0 + c] - j0;
        if (r >= 0 && r < rows) s.target_logit[i0 + c] = z[r * kTileCols + c] + bias(j0 + r);
      }
      for_entries(g, ib, jb, z, [&](A& product, int64_t entry) {
        g.taken[entry] = product + bias(g.indices[entry]);
        product = kNothing<A>;
      });
      add_bias(s.bias ? s.bias + j0 : nullptr, rows, whole, z, student_top);
      for (int64_t c = 0; c < whole; ++c) raise<form.value, own.value>(sums[c], student_top[c], teacher_top[c], t);
      add_tile<form.value, own.value>(z, q, rows, whole, t, sums);
    }
  });
}

namespace {

// The sums of a row over all chunks of classes.
template <Divergence kForm, bool kOwn, class P>
RowSums<acc_t<P>> sums_of(const LinearDistillation<P>& g, int64_t row, const Temperature<acc_t<P>>& t) {
  using A = acc_t<P>;
  const int64_t chunks = ceil_div(g.student.pairs.row_blocks(), g.student.chunk_classes);
  RowSums<A> all;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    RowSums<A> part = g.sums[chunk * g.rows() + row];
    raise<kForm, kOwn>(all, part.student_top, part.teacher_top, t);
    raise<kForm, kOwn>(part, all.student_top, all.teacher_top, t);
    all.student += part.student, all.teacher += part.teacher, all.cross += part.cross, all.hard += part.hard;
  }
  return all;
}

// log(e^a + e^b), where one of them is not -inf.
inline double log_of_sum(double a, double b) {
  const double high = max_(a, b), low = min_(a, b);
  return high + std::log1p(std::exp(low - high));
}

// An offline teacher's divergence from a student in one outcome, and its derivative by the student's probability s, up to a
// constant, times s.
struct Outcome {
  double loss, slope;
};
template <class P>
Outcome outcome_of(const LinearDistillation<P>& g, double log_s, double log_p, double s, double p) {
  if (!g.jsd) return {p == 0 ? 0 : p * (log_p - log_s), -p};
  if (s == 0 && p == 0) return {0, 0};
  const double log_m = log_of_sum(log_s + std::log1p(-g.beta), log_p + std::log(g.beta));
  const double of_s = s == 0 ? 0 : (1 - g.beta) * s * (log_s - log_m);
  return {of_s + (p == 0 ? 0 : g.beta * p * (log_p - log_m)), of_s};
}

// Of one row: its divergence from an offline teacher; the maximum of its logits and the sum of their exponentials at T = 1; and
// by what the student's probabilities among all other classes are multiplied in their gradients.
struct Offline {
  double divergence, top, hard, factor;
};
// `others` are the sums of all other classes. Leaves in `taken` the gradients of the teacher's classes.
template <bool kOwn, class P>
Offline offline_row(const LinearDistillation<P>& g, int64_t i, const RowSums<acc_t<P>>& others, double soft, double hard) {
  using A = acc_t<P>;
  const A* log_probs = g.log_probs + i * g.k;
  A *taken = g.taken + i * g.k, highest = others.student_top;
  for (int64_t e = 0; e < g.k; ++e) highest = max_(taken[e], highest);
  const double inv_t = Temperature<A>(g.temperature).inverse, top = shift_of(highest);
  const double moved = shift_of(others.student_top) - top, log_others = std::log(others.student) + moved * inv_t;
  double sum = std::exp(log_others), hard_sum = others.hard == 0 ? 0 : others.hard * std::exp(moved), known = 0;
  for (int64_t e = 0; e < g.k; ++e) {
    sum += std::exp((taken[e] - top) * inv_t);
    if (kOwn) hard_sum += std::exp(taken[e] - top);
    known += std::exp(static_cast<double>(log_probs[e]));
  }
  const double log_sum = std::log(sum), tail = known > 1 ? 0 : 1 - known, s_others = std::exp(log_others - log_sum);
  Outcome last{0, 0};
  if (g.k < g.student.pairs.n) last = outcome_of(g, log_others - log_sum, std::log(tail), s_others, tail);
  double divergence = last.loss, mean = last.slope;
  const auto each = [&](int64_t e, auto f) {
    const double log_s = (taken[e] - top) * inv_t - log_sum, log_p = log_probs[e], s = std::exp(log_s);
    f(s, outcome_of(g, log_s, log_p, s, std::exp(log_p)));
  };
  for (int64_t e = 0; e < g.k; ++e) {
    each(e, [&](double, const Outcome& outcome) { divergence += outcome.loss, mean += outcome.slope; });
  }
  for (int64_t e = 0; e < g.k; ++e) {
    each(e, [&](double s, const Outcome& outcome) {
      const double of_hard = kOwn ? std::exp(taken[e] - top) / hard_sum : 0;
      taken[e] = static_cast<A>(soft * (outcome.slope - mean * s) + hard * of_hard);
    });
  }
  return {divergence, top, hard_sum, last.slope - mean * s_others};
}

template <Divergence kForm, bool kOwn, class P>
void finish_row(const LinearDistillation<P>& g, int64_t i) {
  using A = acc_t<P>;
  const LinearCrossEntropy<P>& student = g.student;
  const int64_t at = i - student.first * kTileCols;
  const Temperature<A> t(g.temperature);
  const RowSums<A> row = sums_of<kForm, kOwn>(g, at, t);
  const double u = student.row_coef[i], hard = u * g.hard_weight;
  const double shift = shift_of(row.student_top);
  double soft = u * (1 - g.hard_weight) * g.temperature, inverse = 1 / row.student;
  Offline all{divergence_of<kForm>(row, t), shift, kOwn ? row.hard : row.student, 0};
  const double mean = kForm == Divergence::reverse_kl ? all.divergence : 0;
  double hard_inverse = 1 / all.hard;
  if (kForm == Divergence::none && g.k >= 0) {
    all = offline_row<kOwn>(g, i, row, soft, hard);
    const bool some = row.student != 0;
    inverse = some ? inverse : 0, hard_inverse = some ? std::exp(shift - all.top) / all.hard : 0;
  }
  if (kForm == Divergence::none) soft *= all.factor;
  double loss = g.hard_weight < 1 ? (1 - g.hard_weight) * g.temperature * (g.temperature * all.divergence) : 0;
  if (g.hard_weight > 0) {
    loss += g.hard_weight * (std::log(all.hard) - (static_cast<double>(student.target_logit[i]) - all.top));
  }
  student.loss[i] = static_cast<A>(loss);
  const double log_sums = std::log(row.teacher) - std::log(row.student);
  const double values[] = {shift, inverse,     shift_of(row.teacher_top), 1 / row.teacher, mean, log_sums, soft,
                           hard,  hard_inverse};
  for (int64_t v = 0; v < g.kSlopes; ++v) g.slopes[v * g.rows() + at] = static_cast<A>(values[v]);
}

// The slopes of one vector of rows.
template <class P>
Slope<Vec<acc_t<P>>> slopes_at(const LinearDistillation<P>& g, int64_t at) {
  using V = Vec<acc_t<P>>;
  const auto value = [&](int64_t v) { return load<V>(g.slopes + v * g.rows() + at); };
  return {value(0), value(1), value(2), value(3), value(4), value(5), value(6), value(7), value(8)};
}

}  // namespace

template <class P>
void linear_distillation_rows(const LinearDistillation<P>& g, int64_t jb) {
  const int64_t i0 = jb * kTileCols, cols = cols_of(g.student.pairs, jb);
  with_form(g, [&](auto form, auto own) {
    for (int64_t i = i0; i < i0 + cols; ++i) finish_row<form.value, own.value>(g, i);
  });
  for (int64_t v = 0; v < g.kSlopes; ++v) {
    for (int64_t c = cols; c < kTileCols; ++c) g.slopes[v * g.rows() + i0 - g.student.first * kTileCols + c] = 0;
  }
}

template <class P>
void linear_distillation_mix(const LinearDistillation<P>& g, int64_t class_chunk, int64_t jb) {
  using A = acc_t<P>;
  constexpr int64_t lanes = Vectors<A>::lanes;
  const LinearCrossEntropy<P>& s = g.student;
  const int64_t at = (jb - s.first) * kTileCols;
  const int64_t ib0 = class_chunk * s.chunk_classes, ib1 = min_(ib0 + s.chunk_classes, s.pairs.row_blocks());
  const Temperature<A> t(g.temperature);
  const Mixture<A> mixture(g.beta);
  double *of_s = g.mixed + class_chunk * 2 * g.rows() + at, *of_p = of_s + g.rows();
  for (int64_t c = 0; c < kTileCols; ++c) of_s[c] = of_p[c] = 0;
  for (int64_t ib = ib0; ib < ib1; ++ib) {
    const A *z = s.logits(ib, jb), *q = g.teacher_logits(ib, jb);
    for (int64_t c = 0; c < strips_of(s.pairs, jb); c += lanes) {
      const auto row = slopes_at(g, at + c);
      const Vec<A> student_share = row.student_inverse * mixture.rest, teacher_share = row.teacher_inverse * mixture.beta;
      for (int64_t r0 = 0; r0 < rows_of(s.pairs, ib); r0 += kSumRows) {
        Vec<A> some_s{}, some_p{};
        for (int64_t r = r0; r < min_(r0 + kSumRows, rows_of(s.pairs, ib)); ++r) {
          add_mixed<A>(load<Vec<A>>(z + r * kTileCols + c), load<Vec<A>>(q + r * kTileCols + c), row.student_top,
                       row.teacher_top, t, student_share, teacher_share, row.log_sums, mixture, some_s, some_p);
        }
        add_up<A>(some_s, of_s + c), add_up<A>(some_p, of_p + c);
      }
    }
  }
}

template <class P>
void linear_distillation_mixed_rows(const LinearDistillation<P>& g, int64_t jb) {
  using A = acc_t<P>;
  const LinearCrossEntropy<P>& s = g.student;
  const int64_t chunks = ceil_div(s.pairs.row_blocks(), s.chunk_classes), rows = g.rows();
  for (int64_t c = 0; c < cols_of(s.pairs, jb); ++c) {
    const int64_t i = jb * kTileCols + c, at = i - s.first * kTileCols;
    double of_s = 0, of_p = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      of_s += g.mixed[chunk * 2 * rows + at], of_p += g.mixed[(chunk * 2 + 1) * rows + at];
    }
    const double soft = (1 - g.hard_weight) * g.temperature * (g.temperature * (of_s + of_p));
    s.loss[i] = static_cast<A>(soft + s.loss[i]);
    g.slopes[4 * rows + at] = static_cast<A>(of_s / (1 - g.beta));
  }
}

template <class P>
void linear_distillation_gradients(const LinearDistillation<P>& g, int64_t classes) {
  using A = acc_t<P>;
  constexpr int64_t lanes = Vectors<A>::lanes;
  const LinearCrossEntropy<P>& s = g.student;
  const Temperature<A> t(g.temperature);
  const Mixture<A> mixture(g.beta);
  const int64_t ib0 = classes * s.group, ib1 = min_(ib0 + s.group, s.pairs.row_blocks());
  with_form(g, [&](auto form, auto own) {
    for (int64_t jb = s.first; jb < s.last; ++jb) {
      const int64_t i0 = jb * kTileCols, at = i0 - s.first * kTileCols;
      for (int64_t ib = ib0; ib < ib1; ++ib) {
        const int64_t rows = rows_of(s.pairs, ib), j0 = ib * kTileRows;
        A* z = s.logits(ib, jb);
        const A* q = form.value == Divergence::none ? nullptr : g.teacher_logits(ib, jb);
        for (int64_t c = 0; c < strips_of(s.pairs, jb); c += lanes) {
          const auto row = slopes_at(g, at + c);
          for (int64_t r = 0; r < rows; ++r) {
            A* to = z + r * kTileCols + c;
            Vec<A> taught{};
            if constexpr (form.value != Divergence::none) taught = load<Vec<A>>(q + r * kTileCols + c);
            store(slope_of<form.value, own.value, A>(load<Vec<A>>(to), taught, row, t, mixture), to);
          }
        }
        for_entries(g, ib, jb, z, [&](A& gradient, int64_t entry) { gradient += g.taken[entry]; });
        for (int64_t c = 0; g.hard_weight > 0 && c < cols_of(s.pairs, jb); ++c) {
          const int64_t r = s.target[i0 + c] - j0;
          if (r >= 0 && r < rows) z[r * kTileCols + c] -= g.slopes[7 * g.rows() + at + c];
        }
      }
    }
  });
}

#define VLMK_INSTANTIATE(P)                                                              \
  template void linear_distillation_rows(const LinearDistillation<P>&, int64_t);         \
  template void linear_distillation_mix(const LinearDistillation<P>&, int64_t, int64_t); \
  template void linear_distillation_mixed_rows(const LinearDistillation<P>&, int64_t);   \
  template void linear_distillation_gradients(const LinearDistillation<P>&, int64_t);
#define VLMK_INSTANTIATE_PAIR(P, Q) \
  template void linear_distillation_logits(const LinearDistillation<P>&, const Pairs<Q>&, int64_t, int64_t, acc_t<P>*);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)
VLMK_INSTANTIATE_PAIR(float, float)
VLMK_INSTANTIATE_PAIR(float, bf16)
VLMK_INSTANTIATE_PAIR(bf16, float)
VLMK_INSTANTIATE_PAIR(bf16, bf16)
VLMK_INSTANTIATE_PAIR(double, double)

}  // namespace vlmk::VLMK_ISA
