#include "vlmkernels/pairwise_small.h"

#include "pairwise.h"

namespace vlmk::VLMK_ISA {
namespace {

template <class P>
int64_t rows_of(const PairwiseSmall<P>& g, int64_t ib) {
  return min_(kSmallRows, g.pairs.n - ib * kSmallRows);
}

// x of row block ib, times sign. Products are summed in parts: one long chain of additions would round more than mm does.
template <class P>
void similarities(const PairwiseSmall<P>& g, int64_t ib, acc_t<P> sign) {
  const Pairs<P>& p = g.pairs;
  const int64_t i0 = ib * kSmallRows, rows = rows_of(g, ib);
  for (int64_t j = 0; j < g.ldx; j += kSmallCols) {
    for (int64_t d = 0; d < p.depth; d += kSumDepth) {
      p.product(rows, kSmallCols, min_(kSumDepth, p.depth - d), p.depth, kSmallCols, g.ldx, d > 0, p.q + i0 * p.depth + d,
                p.kt + j * p.depth + d * kSmallCols, g.x + i0 * g.ldx + j);
    }
  }
  for (int64_t i = i0; (p.a || sign < 0) && i < i0 + rows; ++i) {
    acc_t<P>* x = g.x + i * g.ldx;
    const acc_t<P> factor = p.a ? sign * p.a[i] : sign;
#pragma omp simd
    for (int64_t j = 0; j < p.m; ++j) x[j] *= p.b ? factor * p.b[j] : factor;
  }
}

// Row i of G, taken apart: a positive goes to its own place, the others to the slopes.
template <class P>
void put_row(const PairwiseSmall<P>& g, int64_t i, acc_t<P>* row) {
  const Pairs<P>& p = g.pairs;
  if (g.positive) {
    g.positive[i] = row[i];
    row[i] = 0;
  }
  if (!g.slope) return;
  P* out = g.slope + i * g.ldx;
  if (p.b) {
#pragma omp simd
    for (int64_t j = 0; j < p.m; ++j) round_to(row[j] * p.b[j], out[j]);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < p.m; ++j) round_to(row[j], out[j]);
  }
  for (int64_t j = p.m; j < g.ldx; ++j) out[j] = P{};
}

// The transposed slopes of row block ib from its rows of G [rows, ldx].
template <class P>
void put_transposed(const PairwiseSmall<P>& g, int64_t ib, const acc_t<P>* block) {
  using A = acc_t<P>;
  if (!g.slope_t) return;
  const Pairs<P>& p = g.pairs;
  const int64_t i0 = ib * kSmallRows, rows = rows_of(g, ib);
  P* out = g.slope_t + i0;
  A a[kSmallRows];
  for (int64_t r = 0; r < rows; ++r) a[r] = p.a ? p.a[i0 + r] : A(1);
  const auto put = [&](int64_t c, int64_t r, A value) { round_to(a[r] * value, out[c * g.ldt + r]); };
  if constexpr (sizeof(A) == 4) {
    const auto put_words = [&](int64_t c, int64_t r, Vector words) {
      float values[kWords];
      __builtin_memcpy(values, &words, sizeof(words));
      P* to = out + c * g.ldt + r;
#pragma omp simd
      for (int64_t k = 0; k < kWords; ++k) round_to(a[r + k] * values[k], to[k]);
    };
    for_columns(block, g.ldx, rows, p.m, put_words, put);
  } else {
    for (int64_t c = 0; c < p.m; ++c) {
      for (int64_t r = 0; r < rows; ++r) put(c, r, block[r * g.ldx + c]);
    }
  }
  for (int64_t c = 0; i0 + rows == p.n && c < p.m; ++c) {
    for (int64_t i = p.n; i < g.ldt; ++i) g.slope_t[c * g.ldt + i] = P{};
  }
}

// (1 - smoothing) (lse - positive) + smoothing (lse - mean), with lse = scale max + log.
template <class A>
double cross_entropy(A smoothing, A scale, A max, A log, A positive, A mean) {
  return (1 - smoothing) * (scale * (max - positive) + log) + smoothing * (scale * (max - mean) + log);
}

}  // namespace

// Logits enter as scale (x - maximum of x) with scale >= 0: the difference is taken before the factor can round it.
template <class P>
void small_log_sum_exps_rows(const PairwiseSmall<P>& g, int64_t ib) {
  using A = acc_t<P>;
  const A scale = std::fabs(g.pairs.scale);
  const int64_t i0 = ib * kSmallRows, i1 = i0 + rows_of(g, ib), m = g.pairs.m;
  A *col_max = g.part_max + ib * m, *col_sum = g.part_sum + ib * m;
  similarities(g, ib, g.pairs.scale < 0 ? A(-1) : A(1));
  for (int64_t j = 0; g.columns && j < m; ++j) col_max[j] = -__builtin_inf(), col_sum[j] = 0;
  for (int64_t i = i0; i < i1; ++i) {
    const A* x = g.x + i * g.ldx;
    A top = -__builtin_inf();
    double sum = 0;
    if (g.columns) {
#pragma omp simd reduction(max : top)
      for (int64_t j = 0; j < m; ++j) {
        top = max_(top, x[j]);
        col_max[j] = max_(col_max[j], x[j]);
      }
    } else {
#pragma omp simd reduction(max : top)
      for (int64_t j = 0; j < m; ++j) top = max_(top, x[j]);
    }
    for (int64_t c = 0; c < m; c += kSumPart) {
      A part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t j = c; j < min_(c + kSumPart, m); ++j) part += exp_(scale * (x[j] - top));
      sum += part;
    }
    g.row_max[i] = top;
    g.row_sum[i] = static_cast<A>(sum);
    g.row_log[i] = static_cast<A>(std::log(sum));
  }
  for (int64_t i = i0; g.columns && i < i1; ++i) {
    const A* x = g.x + i * g.ldx;
#pragma omp simd
    for (int64_t j = 0; j < m; ++j) col_sum[j] += exp_(scale * (x[j] - col_max[j]));
  }
}

template <class P>
void small_log_sum_exps_columns(const PairwiseSmall<P>& g) {
  using A = acc_t<P>;
  const A scale = std::fabs(g.pairs.scale);
  const int64_t m = g.pairs.m;
  for (int64_t j = 0; j < m; ++j) g.col_max[j] = g.part_max[j];
  for (int64_t ib = 1; ib < g.row_blocks(); ++ib) {
    for (int64_t j = 0; j < m; ++j) g.col_max[j] = max_(g.col_max[j], g.part_max[ib * m + j]);
  }
  for (int64_t c = 0; c < m; c += kSumPart) {
    const int64_t count = min_(kSumPart, m - c);
    double sum[kSumPart] = {};
    for (int64_t ib = 0; ib < g.row_blocks(); ++ib) {
      const A *part_max = g.part_max + ib * m + c, *part_sum = g.part_sum + ib * m + c, *top = g.col_max + c;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) sum[j] += part_sum[j] * exp_(scale * (part_max[j] - top[j]));
    }
    for (int64_t j = 0; j < count; ++j) {
      g.col_sum[c + j] = static_cast<A>(sum[j]);
      g.col_log[c + j] = static_cast<A>(std::log(sum[j]));
    }
  }
}

template <class P>
void small_cross_entropy_rows(const PairwiseSmall<P>& g, int64_t ib) {
  using A = acc_t<P>;
  const A scale = std::fabs(g.pairs.scale);
  const int64_t i0 = ib * kSmallRows, i1 = i0 + rows_of(g, ib), m = g.pairs.m;
  A* col_total = g.part_total + ib * m;
  small_log_sum_exps_rows(g, ib);
  for (int64_t j = 0; g.smoothing > 0 && g.columns && j < m; ++j) col_total[j] = 0;
  for (int64_t i = i0; i < i1; ++i) {
    const A* x = g.x + i * g.ldx;
    double total = 0;
    for (int64_t c = 0; g.smoothing > 0 && c < m; c += kSumPart) {
      const int64_t end = min_(c + kSumPart, m);
      A part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t j = c; j < end; ++j) part += x[j];
      total += part;
#pragma omp simd
      for (int64_t j = c; j < (g.columns ? end : c); ++j) col_total[j] += x[j];
    }
    g.diagonal[i] = x[i];
    g.loss[i] = cross_entropy<A>(g.smoothing, scale, g.row_max[i], g.row_log[i], x[i], static_cast<A>(total / m));
  }
}

template <class P>
double small_cross_entropy_columns(const PairwiseSmall<P>& g) {
  using A = acc_t<P>;
  const A scale = std::fabs(g.pairs.scale);
  const int64_t m = g.pairs.m;
  small_log_sum_exps_columns(g);
  double loss = 0;
  for (int64_t j = 0; j < m; ++j) {
    double total = 0;
    for (int64_t ib = 0; g.smoothing > 0 && ib < g.row_blocks(); ++ib) total += g.part_total[ib * m + j];
    const A mean = static_cast<A>(total / m);
    loss += cross_entropy<A>(g.smoothing, scale, g.col_max[j], g.col_log[j], g.diagonal[j], mean);
  }
  return loss;
}

template <class P>
void small_cross_entropy_slopes(const PairwiseSmall<P>& g, int64_t ib, acc_t<P>* scratch) {
  using A = acc_t<P>;
  const Pairs<P>& p = g.pairs;
  const A scale = std::fabs(p.scale), u = (g.columns ? A(0.5) : A(1)) / p.n, v = g.columns ? A(0.5) / p.m : A(0);
  const A uniform_u = u * g.smoothing / p.m, uniform_v = v * g.smoothing / p.n;
  const A share = (u + v) * g.smoothing - uniform_u - uniform_v;
  const int64_t i0 = ib * kSmallRows, m = p.m;
  for (int64_t r = 0; r < rows_of(g, ib); ++r) {
    const int64_t i = i0 + r;
    const A *x = g.x + i * g.ldx, top = g.row_max[i], log = g.row_log[i], own = g.diagonal[i];
    A* row = scratch + r * g.ldx;
    // p - 1 by expm1: a confident pair's small gradient keeps its digits
    A slope = u * std::expm1(scale * (own - top) - log) + share;
    // sum_j G_ij x_ij; since a direction's slopes sum to 0, x may be seen from its positive, where rounding of p does least
    double dscale = 0;
    for (int64_t c = 0; c < m; c += kSumPart) {
      const int64_t end = min_(c + kSumPart, m);
      A sum = 0;
      if (g.columns) {
        const A *col_max = g.col_max, *col_log = g.col_log, *positive = g.diagonal;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = c; j < end; ++j) {
          const A by_row = u * exp_(scale * (x[j] - top) - log) - uniform_u;
          const A by_col = v * exp_(scale * (x[j] - col_max[j]) - col_log[j]) - uniform_v;
          sum += by_row * (x[j] - own) + by_col * (x[j] - positive[j]);
          row[j] = by_row + by_col;
        }
      } else {
#pragma omp simd reduction(+ : sum)
        for (int64_t j = c; j < end; ++j) {
          row[j] = u * exp_(scale * (x[j] - top) - log) - uniform_u;
          sum += row[j] * (x[j] - own);
        }
      }
      dscale += sum;
    }
    if (g.columns) slope += v * std::expm1(scale * (own - g.col_max[i]) - g.col_log[i]);
    g.dscale[i] = p.scale < 0 ? -dscale : dscale;
    row[i] = slope;
    put_row(g, i, row);
  }
  put_transposed(g, ib, scratch);
}

template <class P>
void small_logistic(const PairwiseSmall<P>& g, int64_t ib, acc_t<P>* scratch) {
  using A = acc_t<P>;
  const Pairs<P>& p = g.pairs;
  const A scale = p.scale, bias = g.bias, u = A(1) / p.n;
  const int64_t i0 = ib * kSmallRows;
  similarities(g, ib, A(1));
  for (int64_t r = 0; r < rows_of(g, ib); ++r) {
    const int64_t i = i0 + r;
    const A* x = g.x + i * g.ldx;
    A* row = scratch + r * g.ldx;
    double loss = 0, dbias = 0, dscale = 0;
    const auto take = [&](int64_t begin, int64_t end, A sign) {
      for (int64_t c0 = begin; c0 < end; c0 += kSumPart) {
        A l = 0, db = 0, ds = 0;
#pragma omp simd reduction(+ : l, db, ds)
        for (int64_t c = c0; c < min_(c0 + kSumPart, end); ++c) {
          const A y = -sign * (scale * x[c] + bias), e = exp_(y < 0 ? y : -y), inverse = A(1) / (A(1) + e);
          const A dz = -sign * u * (y < 0 ? e * inverse : inverse);
          l += (y > 0 ? y : A(0)) + log1p_(e);
          db += dz;
          ds += dz * x[c];
          row[c] = dz;
        }
        loss += l;
        dbias += db;
        dscale += ds;
      }
    };
    take(0, i, -1);
    take(i, i + 1, 1);
    take(i + 1, p.m, -1);
    g.loss[i] = loss;
    if (!g.need_slopes) continue;
    g.dbias[i] = dbias;
    g.dscale[i] = dscale;
    put_row(g, i, row);
  }
  if (g.need_slopes) put_transposed(g, ib, scratch);
}

namespace {

// The share of row i's pairs in the loss and, for kSlopes, their slopes. s_col, t_col: what makes the columns' exponentials
// softmaxes times their weight.
template <bool kColumns, bool kSlopes, class P>
void distil_row(const SmallDistillation<P>& g, int64_t i, const acc_t<P>* s_col, const acc_t<P>* t_col, acc_t<P>* row) {
  using A = acc_t<P>;
  const PairwiseSmall<P>&s = g.student, &t = g.teacher;
  const A s_scale = std::fabs(s.pairs.scale), t_scale = std::fabs(t.pairs.scale), entropy = g.cross_entropy ? A(0) : A(1);
  const A *x = s.x + i * s.ldx, *y = t.x + i * t.ldx, s_max = s.row_max[i], s_log = s.row_log[i], t_max = t.row_max[i],
          t_log = t.row_log[i], s_row = g.row_weight / s.row_sum[i], t_row = g.row_weight / t.row_sum[i];
  const A *s_col_max = s.col_max, *s_col_log = s.col_log, *t_col_max = t.col_max, *t_col_log = t.col_log;
  const int64_t m = s.pairs.m;
  double loss = 0, dscale = 0;
  for (int64_t c = 0; c < m; c += kSumPart) {
    A l = 0, ds = 0;
#pragma omp simd reduction(+ : l, ds)
    for (int64_t j = c; j < min_(c + kSumPart, m); ++j) {
      A below = x[j] - s_max, student = s_scale * below, teacher = t_scale * (y[j] - t_max), p = t_row * exp_(teacher);
      A slope = 0;
      l += p * (entropy * (teacher - t_log) - (student - s_log));
      if constexpr (kSlopes) {
        slope = s_row * exp_(student) - p;
        ds += slope * below;
      }
      if constexpr (kColumns) {
        below = x[j] - s_col_max[j], student = s_scale * below, teacher = t_scale * (y[j] - t_col_max[j]);
        p = t_col[j] * exp_(teacher);
        l += p * (entropy * (teacher - t_col_log[j]) - (student - s_col_log[j]));
        if constexpr (kSlopes) {
          const A by_col = s_col[j] * exp_(student) - p;
          ds += by_col * below;
          slope += by_col;
        }
      }
      if constexpr (kSlopes) row[j] = slope;
    }
    loss += l;
    dscale += ds;
  }
  s.loss[i] = loss;
  if constexpr (kSlopes) s.dscale[i] = s.pairs.scale < 0 ? -dscale : dscale;
}

}  // namespace

template <class P>
void small_distillation(const SmallDistillation<P>& g, int64_t ib, acc_t<P>* scratch) {
  using A = acc_t<P>;
  const PairwiseSmall<P>& s = g.student;
  A *s_col = scratch + kSmallRows * s.ldx, *t_col = s_col + s.ldx;
#pragma omp simd
  for (int64_t j = 0; j < (s.columns ? s.pairs.m : 0); ++j) {
    s_col[j] = g.col_weight / s.col_sum[j];
    t_col[j] = g.col_weight / g.teacher.col_sum[j];
  }
  const auto distil = s.need_slopes ? (s.columns ? distil_row<true, true, P> : distil_row<false, true, P>)
                                    : (s.columns ? distil_row<true, false, P> : distil_row<false, false, P>);
  for (int64_t r = 0; r < rows_of(s, ib); ++r) {
    const int64_t i = ib * kSmallRows + r;
    A* row = scratch + r * s.ldx;
    distil(g, i, s_col, t_col, row);
    if (s.need_slopes) put_row(s, i, row);
  }
  if (s.need_slopes) put_transposed(s, ib, scratch);
}

template <class P>
void dense_gradient(const DenseGradient<P>& g, int64_t ib, acc_t<P>* scratch) {
  using A = acc_t<P>;
  const int64_t r0 = ib * kSmallRows, rows = min_(kSmallRows, g.rows - r0), pair = kPaired<P> ? 2 : 1;
  for (int64_t c = 0; c < g.width; c += kSmallCols) {
    for (int64_t j = 0; j < g.depth; j += kSumDepth) {
      g.product(rows, min_(kSmallCols, g.width - c), min_(kSumDepth, g.depth - j), g.lds, g.width, g.width, j > 0,
                g.slope + r0 * g.lds + j, g.operand + j * g.width + c * pair, scratch + c);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = r0 + r;
    const P* x = g.x + i * g.d;
    P* dx = g.dx + i * g.d;
    A *sum = scratch + r * g.width, factor = g.factor, radial = 0;
    if (g.positive && i < g.others) add_scaled(g.d, g.positive[i] * (g.inv_y ? g.inv_y[i] : A(1)), g.y + i * g.d, sum);
    if (g.inv) {
      const A inv = g.inv[i];
      factor *= inv;
      radial = inv < A(1e12) ? inv * inv * dot(x, sum, g.d) : A(0);  // below the clamp the norm is a constant
    }
    if (radial != 0) add_scaled(g.d, -radial, x, sum);
#pragma omp simd
    for (int64_t c = 0; c < g.d; ++c) from_acc(factor * sum[c], dx[c]);
  }
}

#define VLMK_INSTANTIATE(P)                                                              \
  template void small_log_sum_exps_rows(const PairwiseSmall<P>&, int64_t);               \
  template void small_log_sum_exps_columns(const PairwiseSmall<P>&);                     \
  template void small_cross_entropy_rows(const PairwiseSmall<P>&, int64_t);              \
  template double small_cross_entropy_columns(const PairwiseSmall<P>&);                  \
  template void small_cross_entropy_slopes(const PairwiseSmall<P>&, int64_t, acc_t<P>*); \
  template void small_distillation(const SmallDistillation<P>&, int64_t, acc_t<P>*);     \
  template void small_logistic(const PairwiseSmall<P>&, int64_t, acc_t<P>*);             \
  template void dense_gradient(const DenseGradient<P>&, int64_t, acc_t<P>*);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)

}  // namespace vlmk::VLMK_ISA
