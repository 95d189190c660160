#pragma once
// What the kernels that walk S = Q K^T in tiles share: products of gradient tiles with the features, and their finish.
#include "pack.h"
#include "simd.h"
#include "vlmkernels/pairwise.h"

namespace vlmk::VLMK_ISA {
namespace {

template <class P>
int64_t rows_of(const Pairs<P>& p, int64_t ib) {
  return min_(kTileRows, p.n - ib * kTileRows);
}
template <class P>
int64_t cols_of(const Pairs<P>& p, int64_t jb) {
  return min_(kTileCols, p.m - jb * kTileCols);
}

// The part of a tile's columns that products touch: whole vectors, few distinct shapes.
inline int64_t width_of(int64_t cols) { return round_up(cols, 64); }

// x[rows][kTileCols] = Q_ib K_jb^T, summed in parts of the depth: one long chain of additions would round more than mm does.
template <class P>
void similarities(const Pairs<P>& p, int64_t ib, int64_t jb, acc_t<P>* x) {
  for (int64_t d = 0; d < p.depth; d += kSumDepth) {
    p.product(rows_of(p, ib), width_of(cols_of(p, jb)), min_(kSumDepth, p.depth - d), p.depth, kTileCols, kTileCols, d > 0,
              p.q + ib * kTileRows * p.depth + d, p.kt + (jb * p.depth + d) * kTileCols, x);
  }
}

template <class A>
A highest(const A* x, int64_t count) {
  A top = x[0];
  for (int64_t i = 1; i < count; ++i) top = max_(top, x[i]);
  return top;
}
template <class A>
A lowest(const A* x, int64_t count) {
  A low = x[0];
  for (int64_t i = 1; i < count; ++i) low = min_(low, x[i]);
  return low;
}

// Whether the maxima of all rows, and of all columns where `columns`, lie within `reach` of the highest, which is returned in
// `reference`: exponentials relative to it then serve all of them.
template <class A>
bool one_reference(const A* row_max, int64_t rows, const A* col_max, int64_t cols, bool columns, A reach, A& reference) {
  reference = highest(row_max, rows);
  A low = lowest(row_max, rows);
  if (columns) low = min_(low, lowest(col_max, cols));
  return low >= reference - reach;
}

// D[rows][depth] = sum over jb of G_jb K_jb, where tile(jb) gives G_jb [rows][kTileCols], 0 beyond its columns.
template <class P, class Tile>
void query_product(const Pairs<P>& p, int64_t ib, Tile tile, acc_t<P>* out) {
  const int64_t rows = rows_of(p, ib);
  for (int64_t i = 0; p.m == 0 && i < rows * p.depth; ++i) out[i] = 0;
  for (int64_t jb = 0; jb < p.col_blocks(); ++jb) {
    const P* g = tile(jb);
    if constexpr (kPaired<P>) {
      p.product(rows, p.depth, whole_units(cols_of(p, jb)), kTileCols, p.depth, p.depth, jb > 0, g,
                p.k + jb * kTileCols * p.depth, out);
    } else {
      p.product(rows, p.d, cols_of(p, jb), kTileCols, p.d, p.depth, jb > 0, g, p.k + jb * kTileCols * p.d, out);
    }
  }
}

// D'^T[d0 .. d1)[kTileCols] += sum over row blocks [first, last) of Q_ib^T G_ib, where tile(ib, out) gives G_ib as a B operand
// of kTileRows rows: in place, or written to `out`, which it must be when several tiles make one sum.
template <class P, class Tile>
void key_product(const Pairs<P>& p, int64_t jb, int64_t first, int64_t last, int64_t d0, int64_t d1, bool accumulate,
                 P* operand, Tile tile, acc_t<P>* out) {
  constexpr int64_t group = kKeyTiles<P>, group_rows = group * kTileRows;
  const int64_t width = width_of(cols_of(p, jb));
  for (int64_t ib = first; ib < last; ib += group) {
    const P* g = tile(ib, operand);
    int64_t rows = rows_of(p, ib);
    for (int64_t next = ib + 1; next < min_(ib + group, last); ++next) {
      tile(next, operand + (next - ib) * kTileSize);
      rows += rows_of(p, next);
    }
    if constexpr (kPaired<P>) {  // products run over all the rows of the group
      for (int64_t i = (rows + 1) / 2 * 2 * kTileCols; i < group_rows * kTileCols; ++i) operand[i] = P{};
      rows = group_rows;
    }
    p.product(d1 - d0, width, rows, group_rows, kTileCols, kTileCols, accumulate || ib > first,
              p.qt + ((ib - p.qt_first) * p.d + d0 * group) * kTileRows, g, out + d0 * kTileCols);
  }
}

// One finished row: adds extra and the positives' share (w times y), takes the dot with x and writes the gradient.
template <class P>
void finish_row(const Finish<P>& f, int64_t row, int64_t d, acc_t<P> scale, acc_t<P>* sum) {
  using A = acc_t<P>;
  const P* x = f.x + row * f.ldx;
  if (f.extra) {
    const A* extra = f.extra + row * d;
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) sum[c] += extra[c];
  }
  const A inv = f.inv ? f.inv[row] : A(1);
  f.dot[row] = dot(x, sum, d);
  const A radial = f.inv && inv < A(1e12) ? inv * inv * f.dot[row] : A(0);  // below the clamp the norm is a constant
  const A factor = scale * inv;
  P* dx = f.dx + row * d;
#pragma omp simd
  for (int64_t c = 0; c < d; ++c) from_acc(factor * (sum[c] - radial * to_acc(x[c])), dx[c]);
}

// sum += w * y
template <class P>
void add_scaled(int64_t d, acc_t<P> w, const P* y, acc_t<P>* sum) {
#pragma omp simd
  for (int64_t c = 0; c < d; ++c) sum[c] += w * to_acc(y[c]);
}

}  // namespace
}  // namespace vlmk::VLMK_ISA
