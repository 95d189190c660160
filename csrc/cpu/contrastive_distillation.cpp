#include "vlmkernels/contrastive_distillation.h"

#include "pairwise.h"

namespace vlmk::VLMK_ISA {
namespace {

// One exponential serves a tile's rows and columns whose maxima lie within this distance of the highest: what is subtracted
// from a logit is then of its own order, and rounds the difference no more than the logit is rounded.
template <class A>
constexpr A kReach = sizeof(A) == 8 ? A(600) : A(16);

template <class P>
void logits(const Pairs<P>& p, int64_t ib, int64_t jb, acc_t<P>* x) {
  similarities(p, ib, jb, x);
  for (int64_t r = 0; r < rows_of(p, ib); ++r) {
    acc_t<P>* row = x + r * kTileCols;
#pragma omp simd
    for (int64_t c = 0; c < cols_of(p, jb); ++c) row[c] *= p.scale;
  }
}

// The maxima of a tile's rows and columns.
template <class A>
void maxima(const A* x, int64_t rows, int64_t cols, A* row_max, A* col_max) {
  for (int64_t c = 0; c < cols; ++c) col_max[c] = -__builtin_inf();
  for (int64_t r = 0; r < rows; ++r) {
    const A* row = x + r * kTileCols;
    A top = -__builtin_inf();
#pragma omp simd reduction(max : top)
    for (int64_t c = 0; c < cols; ++c) {
      top = max_(top, row[c]);
      col_max[c] = max_(col_max[c], row[c]);
    }
    row_max[r] = top;
  }
}

// What is subtracted from the logits of rows, or of columns, before the exponentials.
template <class A>
struct References {
  const A *student, *teacher;
};

// The sums of a tile's rows and, for kColumns, columns, relative to the references; kShared: which are the same for all.
template <bool kShared, bool kColumns, class A>
void sums_of_tile(const A* s, const A* t, int64_t rows, int64_t cols, References<A> row_ref, References<A> col_ref,
                  LogitSums<A> row, LogitSums<A> col) {
  A some[5][kTileCols];
  double* const col_sums[5] = {col.student, col.moment, col.teacher, col.cross, col.gap};
  for (double* sums : col_sums) {
    for (int64_t c = 0; kColumns && c < cols; ++c) sums[c] = 0;
  }
  for (int64_t r0 = 0; r0 < rows; r0 += kSumRows) {
    for (A* sums : some) {
      for (int64_t c = 0; kColumns && c < cols; ++c) sums[c] = 0;
    }
    for (int64_t r = r0; r < min_(r0 + kSumRows, rows); ++r) {
      const A *s_row = s + r * kTileCols, *t_row = t + r * kTileCols;
      const A s_ref = row_ref.student[r], t_ref = row_ref.teacher[r];
      double student = 0, moment = 0, teacher = 0, cross = 0, gap = 0;
#pragma omp simd reduction(+ : student, moment, teacher, cross, gap)
      for (int64_t c = 0; c < cols; ++c) {
        A x = s_row[c] - s_ref, y = t_row[c] - t_ref, ex = exp_(x), ey = exp_(y);
        student += ex;
        moment += static_cast<double>(ex) * x;
        teacher += ey;
        cross += static_cast<double>(ey) * x;
        gap += static_cast<double>(ey) * (y - x);
        if constexpr (kColumns) {
          if constexpr (!kShared) {
            x = s_row[c] - col_ref.student[c], y = t_row[c] - col_ref.teacher[c];
            ex = exp_(x), ey = exp_(y);
          }
          some[0][c] += ex;
          some[1][c] += ex * x;
          some[2][c] += ey;
          some[3][c] += ey * x;
          some[4][c] += ey * (y - x);
        }
      }
      row.student[r] = student, row.moment[r] = moment, row.teacher[r] = teacher, row.cross[r] = cross, row.gap[r] = gap;
    }
    for (int64_t k = 0; kColumns && k < 5; ++k) {
      for (int64_t c = 0; c < cols; ++c) col_sums[k][c] += some[k][c];
    }
  }
}

// (s_max .. gap) take in part i, whose sums are relative to s_ref and t_ref.
template <class A>
VLMK_INLINE void merge(A& s_max, A& t_max, double& student, double& moment, double& teacher, double& cross, double& gap,
                       const LogitSums<A>& part, int64_t i, A s_ref, A t_ref) {
  const A s_top = max_(s_max, part.student_max[i]), t_top = max_(t_max, part.teacher_max[i]);
  const double s_keep = exp_(s_max - s_top), t_keep = exp_(t_max - t_top);
  const double s_take = exp_(s_ref - s_top), t_take = exp_(t_ref - t_top);
  const double s_shift = student > 0 ? s_max - s_top : A(0),
               t_shift = student > 0 ? t_max - t_top : A(0);  // from -inf at first
  const double s_move = s_ref - s_top, t_move = t_ref - t_top;
  gap = t_keep * (gap + (t_shift - s_shift) * teacher) + t_take * (part.gap[i] + (t_move - s_move) * part.teacher[i]);
  cross = t_keep * (cross + s_shift * teacher) + t_take * (part.cross[i] + s_move * part.teacher[i]);
  moment = s_keep * (moment + s_shift * student) + s_take * (part.moment[i] + s_move * part.student[i]);
  student = s_keep * student + s_take * part.student[i];
  teacher = t_keep * teacher + t_take * part.teacher[i];
  s_max = s_top;
  t_max = t_top;
}

template <class A>
void merge_all(LogitSums<A> to, LogitSums<A> part, References<A> ref, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    merge(to.student_max[i], to.teacher_max[i], to.student[i], to.moment[i], to.teacher[i], to.cross[i], to.gap[i], part, i,
          ref.student[i], ref.teacher[i]);
  }
}

template <class A>
void clear(LogitSums<A> sums, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    sums.student_max[i] = sums.teacher_max[i] = -__builtin_inf();
    sums.student[i] = sums.moment[i] = sums.teacher[i] = sums.cross[i] = sums.gap[i] = 0;
  }
}

}  // namespace

template <class P>
void contrastive_distillation_stats(const ContrastiveDistillationStats<P>& g, int64_t row_chunk, int64_t col_chunk,
                                    acc_t<P>* scratch) {
  using A = acc_t<P>;
  const Pairs<P>& p = g.student;
  A row_maxima[2 * kTileRows], col_maxima[2 * kTileCols], s_same[kTileCols], t_same[kTileCols];
  double row_sums[5 * kTileRows], col_sums[5 * kTileCols];
  const LogitSums<A> row = logit_sums(row_maxima, row_sums, kTileRows), col = logit_sums(col_maxima, col_sums, kTileCols);
  const int64_t ib0 = row_chunk * g.chunk_rows, ib1 = min_(ib0 + g.chunk_rows, p.row_blocks());
  const int64_t jb0 = col_chunk * g.chunk_cols, jb1 = min_(jb0 + g.chunk_cols, p.col_blocks());
  const LogitSums<A> rows_part = g.rows.at(col_chunk * p.n), cols_part = g.cols.at(g.columns ? row_chunk * p.m : 0);
  clear(rows_part, ib0 * kTileRows, min_(ib1 * kTileRows, p.n));
  if (g.columns) clear(cols_part, jb0 * kTileCols, min_(jb1 * kTileCols, p.m));
  for (int64_t jb = jb0; jb < jb1; ++jb) {
    for (int64_t ib = ib0; ib < ib1; ++ib) {
      const int64_t rows = rows_of(p, ib), cols = cols_of(p, jb), index = ib * p.col_blocks() + jb;
      A *s = index < g.stored_tiles ? g.store + 2 * index * kTileSize : scratch, *t = s + kTileSize, s_ref, t_ref;
      logits(p, ib, jb, s);
      logits(g.teacher, ib, jb, t);
      maxima(s, rows, cols, row.student_max, col.student_max);
      maxima(t, rows, cols, row.teacher_max, col.teacher_max);
      References<A> row_ref{row.student_max, row.teacher_max}, col_ref{col.student_max, col.teacher_max};
      const bool shared = one_reference(row.student_max, rows, col.student_max, cols, g.columns, kReach<A>, s_ref) &&
                          one_reference(row.teacher_max, rows, col.teacher_max, cols, g.columns, kReach<A>, t_ref);
      if (shared) {
        for (int64_t c = 0; c < kTileCols; ++c) s_same[c] = s_ref, t_same[c] = t_ref;
        row_ref = col_ref = {s_same, t_same};
      }
      const auto sums = shared ? (g.columns ? sums_of_tile<true, true, A> : sums_of_tile<true, false, A>)
                               : (g.columns ? sums_of_tile<false, true, A> : sums_of_tile<false, false, A>);
      sums(s, t, rows, cols, row_ref, col_ref, row, col);
      merge_all(rows_part.at(ib * kTileRows), row, row_ref, rows);
      if (g.columns) merge_all(cols_part.at(jb * kTileCols), col, col_ref, cols);
    }
  }
}

template <class A>
void contrastive_distillation_merge(LogitSums<A> parts, int64_t part_count, int64_t count, int64_t begin, int64_t end,
                                    bool cross_entropy, A* loss, A* out) {
  for (int64_t i = begin; i < end; ++i) {
    A s_max = parts.student_max[i], t_max = parts.teacher_max[i];
    double student = parts.student[i], moment = parts.moment[i], teacher = parts.teacher[i], cross = parts.cross[i],
           gap = parts.gap[i];
    for (int64_t part = 1; part < part_count; ++part) {
      const int64_t at = part * count + i;
      merge(s_max, t_max, student, moment, teacher, cross, gap, parts, at, parts.student_max[at], parts.teacher_max[at]);
    }
    const double s_log = std::log(student), t_log = std::log(teacher), taught = cross / teacher;
    loss[i] = static_cast<A>(cross_entropy ? s_log - taught : gap / teacher + (s_log - t_log));
    out[i] = s_max;
    out[count + i] = static_cast<A>(s_log);
    out[2 * count + i] = t_max;
    out[3 * count + i] = static_cast<A>(t_log);
    out[4 * count + i] = static_cast<A>(moment / student - taught);
  }
}

namespace {

// The factors that turn exponentials relative to `reference` into softmaxes times the coefficients.
template <class A>
void factors(const A* coef, const A* max, const A* log, A reference, int64_t count, A* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = coef[i] * exp_((reference - max[i]) - log[i]);
}

template <bool kColumns, class P>
void separate_gradients(const ContrastiveDistillationGrads<P>& g, int64_t i, int64_t j0, int64_t cols, const acc_t<P>* s,
                        const acc_t<P>* t, P* out) {
  using A = acc_t<P>;
  const A u = g.row_coef[i], s_max = g.rows.student_max[i], s_log = g.rows.student_log[i], t_max = g.rows.teacher_max[i],
          t_log = g.rows.teacher_log[i];
#pragma omp simd
  for (int64_t c = 0; c < cols; ++c) {
    A sum = u * (exp_((s[c] - s_max) - s_log) - exp_((t[c] - t_max) - t_log));
    if constexpr (kColumns) {
      const int64_t j = j0 + c;
      sum += g.col_coef[j] * (exp_((s[c] - g.cols.student_max[j]) - g.cols.student_log[j]) -
                              exp_((t[c] - g.cols.teacher_max[j]) - g.cols.teacher_log[j]));
    }
    round_to(sum, out[c]);
  }
}

}  // namespace

template <class P>
void contrastive_distillation_tile(const ContrastiveDistillationGrads<P>& g, int64_t ib, int64_t jb, acc_t<P>* scratch) {
  using A = acc_t<P>;
  const Pairs<P>& p = g.student;
  const int64_t rows = rows_of(p, ib), cols = cols_of(p, jb), i0 = ib * kTileRows, j0 = jb * kTileCols;
  const int64_t index = ib * p.col_blocks() + jb;
  const bool stored = index < g.stored_tiles, columns = g.col_coef != nullptr;
  const A *s = stored ? g.store + 2 * index * kTileSize : scratch, *t = s + kTileSize;
  if (!stored) {
    logits(p, ib, jb, scratch);
    logits(g.teacher, ib, jb, scratch + kTileSize);
  }
  P* out = g.tile(ib, jb);
  A s_ref = 0, t_ref = 0, s_row[kTileRows], t_row[kTileRows], s_col[kTileCols], t_col[kTileCols];
  const auto serves = [&](const A* row_max, const A* col_max, A& reference) {
    return one_reference(row_max + i0, rows, columns ? col_max + j0 : nullptr, cols, columns, kReach<A>, reference);
  };
  const bool shared =
      serves(g.rows.student_max, g.cols.student_max, s_ref) && serves(g.rows.teacher_max, g.cols.teacher_max, t_ref);
  if (shared) {
    factors(g.row_coef + i0, g.rows.student_max + i0, g.rows.student_log + i0, s_ref, rows, s_row);
    factors(g.row_coef + i0, g.rows.teacher_max + i0, g.rows.teacher_log + i0, t_ref, rows, t_row);
    for (int64_t c = 0; c < cols; ++c) s_col[c] = t_col[c] = 0;
    if (columns) {
      factors(g.col_coef + j0, g.cols.student_max + j0, g.cols.student_log + j0, s_ref, cols, s_col);
      factors(g.col_coef + j0, g.cols.teacher_max + j0, g.cols.teacher_log + j0, t_ref, cols, t_col);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const A *x = s + r * kTileCols, *y = t + r * kTileCols;
    P* to = out + r * kTileCols;
    if (shared) {
      const A s_factor = s_row[r], t_factor = t_row[r];
#pragma omp simd
      for (int64_t c = 0; c < cols; ++c) {
        const A student = exp_(x[c] - s_ref) * (s_factor + s_col[c]);
        const A teacher = exp_(y[c] - t_ref) * (t_factor + t_col[c]);
        round_to(student - teacher, to[c]);
      }
    } else if (columns) {
      separate_gradients<true>(g, i0 + r, j0, cols, x, y, to);
    } else {
      separate_gradients<false>(g, i0 + r, j0, cols, x, y, to);
    }
    for (int64_t c = cols; c < kTileCols; ++c) to[c] = P{};
  }
  for (int64_t i = rows * kTileCols; i < kTileSize; ++i) out[i] = P{};
}

template <class P>
void contrastive_distillation_query(const ContrastiveDistillationGrads<P>& g, int64_t ib, acc_t<P>* sums) {
  const Pairs<P>& p = g.student;
  query_product(p, ib, [&](int64_t jb) { return static_cast<const P*>(g.tile(ib, jb)); }, sums);
  for (int64_t r = 0; r < rows_of(p, ib); ++r) finish_row(g.query, ib * kTileRows + r, p.d, p.scale, sums + r * p.depth);
}

template <class P>
void contrastive_distillation_key(const ContrastiveDistillationGrads<P>& g, int64_t jb, int64_t d0, int64_t d1, bool accumulate,
                                  P* operand) {
  const Pairs<P>& p = g.student;
  key_product(
      p, jb, g.first, g.last, d0, d1, accumulate, operand,
      [&](int64_t ib, P* to) {
        const P* tile = g.tile(ib, jb);
        if constexpr (kPaired<P>) {
          for (int64_t r = 0; r < rows_of(p, ib); r += 2) {  // a row beyond the tile's own holds zeros
            const P *x = tile + r * kTileCols, *y = x + kTileCols;
            Pair* pairs = reinterpret_cast<Pair*>(to + r * kTileCols);
#pragma omp simd
            for (int64_t c = 0; c < kTileCols; ++c) pairs[c].bits = x[c].bits | static_cast<uint32_t>(y[c].bits) << 16;
          }
          return static_cast<const P*>(to);
        }
        return tile;
      },
      g.key_sums + jb * p.d * kTileCols);
}

template <class P>
void contrastive_distillation_finish_key(const ContrastiveDistillationGrads<P>& g, int64_t jb, acc_t<P>* rows) {
  const Pairs<P>& p = g.student;
  const int64_t cols = cols_of(p, jb);
  transpose<acc_t<P>>(g.key_sums + jb * p.d * kTileCols, kTileCols, p.d, cols, rows, p.d);
  for (int64_t c = 0; c < cols; ++c) finish_row(g.key, jb * kTileCols + c, p.d, p.scale, rows + c * p.d);
}

#define VLMK_INSTANTIATE(P)                                                                                                \
  template void contrastive_distillation_stats(const ContrastiveDistillationStats<P>&, int64_t, int64_t, acc_t<P>*);       \
  template void contrastive_distillation_tile(const ContrastiveDistillationGrads<P>&, int64_t, int64_t, acc_t<P>*);        \
  template void contrastive_distillation_query(const ContrastiveDistillationGrads<P>&, int64_t, acc_t<P>*);                \
  template void contrastive_distillation_key(const ContrastiveDistillationGrads<P>&, int64_t, int64_t, int64_t, bool, P*); \
  template void contrastive_distillation_finish_key(const ContrastiveDistillationGrads<P>&, int64_t, acc_t<P>*);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)
template void contrastive_distillation_merge(LogitSums<float>, int64_t, int64_t, int64_t, int64_t, bool, float*, float*);
template void contrastive_distillation_merge(LogitSums<double>, int64_t, int64_t, int64_t, int64_t, bool, double*, double*);

}  // namespace vlmk::VLMK_ISA
