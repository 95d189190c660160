#include "vlmkernels/info_nce.h"

#include "pairwise.h"

namespace vlmk::VLMK_ISA {
namespace {

// With every row's and column's maximum within this distance of the tile's, exp(S - tile maximum) keeps terms down to e^-27 of
// each of them: one exponential serves both directions.
template <class A>
constexpr A kReach = sizeof(A) == 8 ? A(600) : A(60);

template <class P>
struct Tile {
  const P* e;
  acc_t<P> reference;
  TileKind kind;
};

template <class P>
Tile<P> read_tile(const char* at) {
  const auto* info = reinterpret_cast<const TileInfo*>(at);
  return {reinterpret_cast<const P*>(at + kTileHeader), static_cast<acc_t<P>>(info->reference), info->kind};
}
template <class P>
P* write_tile(char* at, acc_t<P> reference, TileKind kind) {
  *reinterpret_cast<TileInfo*>(at) = {static_cast<double>(reference), kind, sizeof(P)};
  return reinterpret_cast<P*>(at + kTileHeader);
}

// Turns similarities into logits in place; row_max [rows] and, for kColumns, col_max [cols] are the tile's own.
template <bool kColumns, class P>
void logits_in_place(const Pairs<P>& p, int64_t ib, int64_t jb, acc_t<P>* s, acc_t<P>* row_max, acc_t<P>* col_max) {
  using A = acc_t<P>;
  const int64_t rows = rows_of(p, ib), cols = cols_of(p, jb), i0 = ib * kTileRows;
  const A* b = p.b ? p.b + jb * kTileCols : nullptr;
  for (int64_t c = 0; c < cols; ++c) col_max[c] = -__builtin_inf();
  for (int64_t r = 0; r < rows; ++r) {
    A* row = s + r * kTileCols;
    const A factor = p.a ? p.scale * p.a[i0 + r] : p.scale;
    A top = -__builtin_inf();
    if (b) {
#pragma omp simd reduction(max : top)
      for (int64_t c = 0; c < cols; ++c) {
        const A x = row[c] * factor * b[c];
        row[c] = x;
        top = max_(top, x);
        if constexpr (kColumns) col_max[c] = max_(col_max[c], x);
      }
    } else {
#pragma omp simd reduction(max : top)
      for (int64_t c = 0; c < cols; ++c) {
        const A x = row[c] * factor;
        row[c] = x;
        top = max_(top, x);
        if constexpr (kColumns) col_max[c] = max_(col_max[c], x);
      }
    }
    row_max[r] = top;
  }
}

template <class P>
void logits(const Pairs<P>& p, int64_t ib, int64_t jb, bool columns, acc_t<P>* s, acc_t<P>* row_max, acc_t<P>* col_max) {
  columns ? logits_in_place<true>(p, ib, jb, s, row_max, col_max) : logits_in_place<false>(p, ib, jb, s, row_max, col_max);
}

// (max, sum, moment) takes in another part with maximum part_max, whose sum and moment are relative to `reference`.
template <class A, class S>
VLMK_INLINE void merge(A& max, S& sum, S& moment, A part_max, A part_sum, A part_moment, A reference) {
  const A top = max_(max, part_max), keep = exp_(max - top), take = exp_(reference - top);
  const A shift = sum > 0 ? max - top : A(0);
  moment = keep * (moment + shift * sum) + take * (part_moment + (reference - top) * part_sum);
  sum = sum * keep + part_sum * take;
  max = top;
}

template <class P>
void zero_positives(const int64_t* positives, int64_t i0, int64_t rows, int64_t j0, int64_t cols, P* e) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t c = positives[i0 + r] - j0;
    if (c >= 0 && c < cols) e[r * kTileCols + c] = P{};
  }
}

// A product over a whole tile must not meet what was in memory before.
template <class P>
void zero_padding(int64_t rows, int64_t cols, P* e) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = cols; c < kTileCols; ++c) e[r * kTileCols + c] = P{};
  }
  for (int64_t i = rows * kTileCols; i < kTileSize; ++i) e[i] = P{};
}

// e = exp(s - reference), and the sums and moments of its rows (kRows) and columns (kColumns).
template <bool kStore, bool kRows, bool kColumns, class P>
void exponentials(const acc_t<P>* s, int64_t rows, int64_t cols, acc_t<P> reference, P* e, acc_t<P>* row_sum,
                  acc_t<P>* row_moment, acc_t<P>* col_sum, acc_t<P>* col_moment) {
  using A = acc_t<P>;
  A some_sum[kTileCols], some_moment[kTileCols];
  for (int64_t c = 0; kColumns && c < cols; ++c) col_sum[c] = col_moment[c] = 0;
  for (int64_t r0 = 0; r0 < rows; r0 += kSumRows) {
    for (int64_t c = 0; kColumns && c < cols; ++c) some_sum[c] = some_moment[c] = 0;
    for (int64_t r = r0; r < min_(r0 + kSumRows, rows); ++r) {
      const A* row = s + r * kTileCols;
      P* out = kStore ? e + r * kTileCols : nullptr;
      double row_total = 0, moment_total = 0;
      for (int64_t c0 = 0; c0 < cols; c0 += kSumPart) {
        A sum = 0, moment = 0;
#pragma omp simd reduction(+ : sum, moment)
        for (int64_t c = c0; c < min_(c0 + kSumPart, cols); ++c) {
          const A below = row[c] - reference, x = exp_(below);
          if constexpr (kRows) {
            sum += x;
            moment += x * below;
          }
          if constexpr (kColumns) {
            some_sum[c] += x;
            some_moment[c] += x * below;
          }
          if constexpr (kStore) round_to(x, out[c]);
        }
        row_total += sum;
        moment_total += moment;
      }
      if constexpr (kRows) {
        row_sum[r] = static_cast<A>(row_total);
        row_moment[r] = static_cast<A>(moment_total);
      }
    }
    for (int64_t c = 0; kColumns && c < cols; ++c) col_sum[c] += some_sum[c], col_moment[c] += some_moment[c];
  }
}

// The tile weighted directly, u_i exp(S_ij - r_i) + v_j exp(S_ij - c_j): two exponentials, in range for any logits.
template <class P>
void weighted(const InfoNceGrads<P>& g, int64_t ib, int64_t jb, const acc_t<P>* s, P* e) {
  using A = acc_t<P>;
  const int64_t rows = rows_of(g.pairs, ib), cols = cols_of(g.pairs, jb), i0 = ib * kTileRows, j0 = jb * kTileCols;
  for (int64_t r = 0; r < rows; ++r) {
    const A* row = s + r * kTileCols;
    P* out = e + r * kTileCols;
    const A top = g.row_max[i0 + r], log = g.row_log[i0 + r], u = g.row_coef[i0 + r];
    if (g.col_max) {
      const A *col_top = g.col_max + j0, *col_log = g.col_log + j0, *v = g.col_coef + j0;
#pragma omp simd
      for (int64_t c = 0; c < cols; ++c) {
        from_acc(u * exp_((row[c] - top) - log) + v[c] * exp_((row[c] - col_top[c]) - col_log[c]), out[c]);
      }
    } else {
#pragma omp simd
      for (int64_t c = 0; c < cols; ++c) from_acc(u * exp_((row[c] - top) - log), out[c]);
    }
  }
  zero_padding(rows, cols, e);
  zero_positives(g.positives, i0, rows, j0, cols, e);
}

template <class P>
Tile<P> tile_at(const InfoNceGrads<P>& g, int64_t ib, int64_t jb, acc_t<P>* s, P* direct) {
  const int64_t index = ib * g.pairs.col_blocks() + jb;
  const char* at = index < g.stored_tiles
                       ? g.store + index * tile_bytes<P>()
                       : g.workspace + (index - max_(g.first * g.pairs.col_blocks(), g.stored_tiles)) * tile_bytes<P>();
  const Tile<P> tile = read_tile<P>(at);
  if (tile.kind != TileKind::absent) return tile;
  acc_t<P> row_max[kTileRows], col_max[kTileCols];
  similarities(g.pairs, ib, jb, s);
  logits(g.pairs, ib, jb, g.col_max != nullptr, s, row_max, col_max);
  weighted(g, ib, jb, s, direct);
  return {direct, 0, TileKind::weighted};
}

// The gradient tile as the operand of the product with K (kAsB false) or with Q (kAsB true): the softmax terms times the factor
// of the other side, b_j or a_i.
template <bool kAsB, class P>
void operand_of(const InfoNceGrads<P>& g, int64_t ib, int64_t jb, const Tile<P>& tile, P* out) {
  using A = acc_t<P>;
  const Pairs<P>& p = g.pairs;
  const int64_t rows = rows_of(p, ib), cols = cols_of(p, jb), i0 = ib * kTileRows, j0 = jb * kTileCols;
  const bool relative = tile.kind == TileKind::relative;
  A by_col[kTileCols], col_term[kTileCols];  // the factor of column c is by_col[c] * row + col_term[c]
  for (int64_t c = 0; c < kTileCols; ++c) {
    by_col[c] = c < cols ? (!kAsB && p.b ? p.b[j0 + c] : A(1)) : A(0);
    col_term[c] = 0;
  }
  if (relative && g.col_max) {
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      col_term[c] = by_col[c] * g.col_coef[j0 + c] * exp_((tile.reference - g.col_max[j0 + c]) - g.col_log[j0 + c]);
    }
  }
  const auto row_term = [&](int64_t i) {
    return relative ? g.row_coef[i] * exp_((tile.reference - g.row_max[i]) - g.row_log[i]) : A(1);
  };
  for (int64_t r = 0; r < rows; ++r) {
    const A side = kAsB && p.a ? p.a[i0 + r] : A(1);
    const A term = row_term(i0 + r);
    const P* e = tile.e + r * kTileCols;
    if constexpr (kAsB) {
      if constexpr (kPaired<P>) {  // two rows at a time, interleaved
        if (r % 2) continue;
        const bool last = r + 1 == rows;
        const A next_side = last ? A(0) : p.a ? p.a[i0 + r + 1] : A(1);
        const A next_term = last ? A(0) : row_term(i0 + r + 1);
        const P* next = last ? e : e + kTileCols;
        Pair* pairs = reinterpret_cast<Pair*>(out + r * kTileCols);
#pragma omp simd
        for (int64_t c = 0; c < kTileCols; ++c) {
          put_pair(to_acc(e[c]) * side * (by_col[c] * term + col_term[c]),
                   to_acc(next[c]) * next_side * (by_col[c] * next_term + col_term[c]), pairs[c]);
        }
        continue;
      }
    }
    P* row = out + r * kTileCols;
#pragma omp simd
    for (int64_t c = 0; c < kTileCols; ++c) round_to(to_acc(e[c]) * side * (by_col[c] * term + col_term[c]), row[c]);
  }
}

}  // namespace

template <class P>
void info_nce_stats(const InfoNceStats<P>& g, int64_t row_chunk, int64_t col_chunk, acc_t<P>* scratch) {
  using A = acc_t<P>;
  const Pairs<P>& p = g.pairs;
  A *s = scratch, *col_top = s + kTileSize, *col_sum = col_top + kTileCols, *col_moment = col_sum + kTileCols;
  A row_top[kTileRows], row_sum[kTileRows], row_moment[kTileRows];
  const int64_t ib0 = row_chunk * g.chunk_rows, ib1 = min_(ib0 + g.chunk_rows, p.row_blocks());
  const int64_t jb0 = col_chunk * g.chunk_cols, jb1 = min_(jb0 + g.chunk_cols, p.col_blocks());
  const auto clear = [](Moments<A> part, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) part.max[i] = -__builtin_inf(), part.sum[i] = part.moment[i] = 0;
  };
  const Moments<A> row_part = g.rows.at(col_chunk * p.n), col_part = g.cols.at(g.columns ? row_chunk * p.m : 0);
  clear(row_part, ib0 * kTileRows, min_(ib1 * kTileRows, p.n));
  if (g.columns) clear(col_part, jb0 * kTileCols, min_(jb1 * kTileCols, p.m));
  for (int64_t jb = jb0; jb < jb1; ++jb) {
    const int64_t j0 = jb * kTileCols, cols = cols_of(p, jb);
    const Moments<A> col = col_part.at(j0);
    for (int64_t ib = ib0; ib < ib1; ++ib) {
      const int64_t i0 = ib * kTileRows, rows = rows_of(p, ib), index = ib * p.col_blocks() + jb;
      const Moments<A> row = row_part.at(i0);
      similarities(p, ib, jb, s);
      logits(p, ib, jb, g.columns, s, row_top, col_top);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t c = g.positives[i0 + r] - j0;
        if (c >= 0 && c < cols) g.positive_logit[i0 + r] = s[r * kTileCols + c];
      }
      char* slot = index < g.stored_tiles ? g.store + index * tile_bytes<P>() : nullptr;
      A reference;
      if (one_reference(row_top, rows, col_top, cols, g.columns, kReach<A>, reference)) {
        if (slot) {
          P* e = write_tile<P>(slot, reference, TileKind::relative);
          const auto take = g.columns ? exponentials<true, true, true, P> : exponentials<true, true, false, P>;
          take(s, rows, cols, reference, e, row_sum, row_moment, col_sum, col_moment);
          zero_padding(rows, cols, e);
          zero_positives(g.positives, i0, rows, j0, cols, e);
        } else {
          const auto take = g.columns ? exponentials<false, true, true, P> : exponentials<false, true, false, P>;
          take(s, rows, cols, reference, nullptr, row_sum, row_moment, col_sum, col_moment);
        }
        for (int64_t r = 0; r < rows; ++r) {
          merge(row.max[r], row.sum[r], row.moment[r], row_top[r], row_sum[r], row_moment[r], reference);
        }
        if (!g.columns) continue;
#pragma omp simd
        for (int64_t c = 0; c < cols; ++c) {
          merge(col.max[c], col.sum[c], col.moment[c], col_top[c], col_sum[c], col_moment[c], reference);
        }
      } else {
        if (slot) zero_padding(0, 0, write_tile<P>(slot, 0, TileKind::absent));
        for (int64_t r = 0; r < rows; ++r) {
          const A* logit = s + r * kTileCols;
          exponentials<false, true, false, P>(logit, 1, cols, row_top[r], nullptr, row_sum, row_moment, nullptr, nullptr);
          merge(row.max[r], row.sum[r], row.moment[r], row_top[r], row_sum[0], row_moment[0], row_top[r]);
        }
        for (int64_t r0 = 0; g.columns && r0 < rows; r0 += kSumRows) {
          for (int64_t c = 0; c < cols; ++c) col_sum[c] = col_moment[c] = 0;
          for (int64_t r = r0; r < min_(r0 + kSumRows, rows); ++r) {
            const A* logit = s + r * kTileCols;
#pragma omp simd
            for (int64_t c = 0; c < cols; ++c) {
              const A below = logit[c] - col_top[c], x = exp_(below);
              col_sum[c] += x;
              col_moment[c] += x * below;
            }
          }
#pragma omp simd
          for (int64_t c = 0; c < cols; ++c) {
            merge(col.max[c], col.sum[c], col.moment[c], col_top[c], col_sum[c], col_moment[c], col_top[c]);
          }
        }
      }
    }
  }
}

template <class A>
void info_nce_merge(Moments<A> parts, int64_t part_count, int64_t count, int64_t begin, int64_t end, Moments<A> out) {
  constexpr int64_t kSome = 256;
  for (int64_t i0 = begin; i0 < end; i0 += kSome) {
    const int64_t some = min_(kSome, end - i0);
    const Moments<A> first = parts.at(i0), to = out.at(i0);
    double sum[kSome], moment[kSome];
    for (int64_t i = 0; i < some; ++i) to.max[i] = first.max[i], sum[i] = first.sum[i], moment[i] = first.moment[i];
    for (int64_t part = 1; part < part_count; ++part) {
      const Moments<A> in = parts.at(part * count + i0);
#pragma omp simd
      for (int64_t i = 0; i < some; ++i) {
        merge(to.max[i], sum[i], moment[i], in.max[i], in.sum[i], in.moment[i], in.max[i]);
      }
    }
    for (int64_t i = 0; i < some; ++i) to.sum[i] = static_cast<A>(sum[i]), to.moment[i] = static_cast<A>(moment[i]);
  }
}

template <class P>
void info_nce_recompute(const InfoNceGrads<P>& g, int64_t ib, int64_t jb, acc_t<P>* s) {
  using A = acc_t<P>;
  const Pairs<P>& p = g.pairs;
  const int64_t rows = rows_of(p, ib), cols = cols_of(p, jb), index = ib * p.col_blocks() + jb;
  char* slot = g.workspace + (index - max_(g.first * p.col_blocks(), g.stored_tiles)) * tile_bytes<P>();
  A row_max[kTileRows], col_max[kTileCols], reference;
  similarities(p, ib, jb, s);
  logits(p, ib, jb, g.col_max != nullptr, s, row_max, col_max);
  if (one_reference(row_max, rows, col_max, cols, g.col_max != nullptr, kReach<A>, reference)) {
    P* e = write_tile<P>(slot, reference, TileKind::relative);
    exponentials<true, false, false, P>(s, rows, cols, reference, e, nullptr, nullptr, nullptr, nullptr);
    zero_padding(rows, cols, e);
    zero_positives(g.positives, ib * kTileRows, rows, jb * kTileCols, cols, e);
  } else {
    weighted(g, ib, jb, s, write_tile<P>(slot, 0, TileKind::weighted));
  }
}

template <class P>
void info_nce_query(const InfoNceGrads<P>& g, int64_t ib, acc_t<P>* sums, acc_t<P>* s, P* operand) {
  using A = acc_t<P>;
  const Pairs<P>& p = g.pairs;
  P* direct = operand + kTileSize;
  query_product(
      p, ib,
      [&](int64_t jb) {
        operand_of<false>(g, ib, jb, tile_at(g, ib, jb, s, direct), operand);
        return static_cast<const P*>(operand);
      },
      sums);
  for (int64_t r = 0; r < rows_of(p, ib); ++r) {
    const int64_t i = ib * kTileRows + r, j = g.positives[i];
    A* sum = sums + r * p.depth;
    if (j >= 0) add_scaled(p.d, g.positive_coef[i] * (p.b ? p.b[j] : A(1)), g.key.x + j * g.key.ldx, sum);
    finish_row(g.query, i, p.d, p.scale, sum);
  }
}

template <class P>
void info_nce_key(const InfoNceGrads<P>& g, int64_t jb, int64_t d0, int64_t d1, bool accumulate, acc_t<P>* s, P* operand) {
  P* direct = operand + kKeyTiles<P> * kTileSize;
  key_product(
      g.pairs, jb, g.first, g.last, d0, d1, accumulate, operand,
      [&](int64_t ib, P* out) {
        operand_of<true>(g, ib, jb, tile_at(g, ib, jb, s, direct), out);
        return static_cast<const P*>(out);
      },
      g.key_sums + jb * g.pairs.d * kTileCols);
}

template <class P>
void info_nce_finish_key(const InfoNceGrads<P>& g, int64_t jb, acc_t<P>* rows) {
  using A = acc_t<P>;
  const Pairs<P>& p = g.pairs;
  const int64_t j0 = jb * kTileCols, cols = cols_of(p, jb);
  transpose<acc_t<P>>(g.key_sums + jb * p.d * kTileCols, kTileCols, p.d, cols, rows, p.d);
  for (int64_t i = 0; i < p.n; ++i) {
    const int64_t c = g.positives[i] - j0;
    if (c >= 0 && c < cols) {
      add_scaled(p.d, g.positive_coef[i] * (p.a ? p.a[i] : A(1)), g.query.x + i * g.query.ldx, rows + c * p.d);
    }
  }
  for (int64_t c = 0; c < cols; ++c) finish_row(g.key, j0 + c, p.d, p.scale, rows + c * p.d);
}

#define VLMK_INSTANTIATE(P)                                                                           \
  template void info_nce_stats(const InfoNceStats<P>&, int64_t, int64_t, acc_t<P>*);                  \
  template void info_nce_recompute(const InfoNceGrads<P>&, int64_t, int64_t, acc_t<P>*);              \
  template void info_nce_query(const InfoNceGrads<P>&, int64_t, acc_t<P>*, acc_t<P>*, P*);            \
  template void info_nce_key(const InfoNceGrads<P>&, int64_t, int64_t, int64_t, bool, acc_t<P>*, P*); \
  template void info_nce_finish_key(const InfoNceGrads<P>&, int64_t, acc_t<P>*);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)
template void info_nce_merge(Moments<float>, int64_t, int64_t, int64_t, int64_t, Moments<float>);
template void info_nce_merge(Moments<double>, int64_t, int64_t, int64_t, int64_t, Moments<double>);

}  // namespace vlmk::VLMK_ISA
