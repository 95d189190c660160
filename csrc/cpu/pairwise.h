#pragma once
// What the kernels that walk S = Q K^T in tiles share: products of gradient tiles with the features, and their finish.
#include "simd.h"
#include "vlmkernels/isa.h"
#include "vlmkernels/pairwise.h"

namespace vlmk::VLMK_ISA {
namespace {

template <class P>
constexpr bool kPaired = sizeof(P) == 2;  // B operands hold pairs of rows

template <class P>
int64_t rows_of(const Pairs<P>& p, int64_t ib) {
  return min_(kTileRows, p.n - ib * kTileRows);
}
template <class P>
int64_t cols_of(const Pairs<P>& p, int64_t jb) {
  return min_(kTileCols, p.m - jb * kTileCols);
}

// The part of a tile's columns that products touch: whole vectors, few distinct shapes.
inline int64_t width_of(int64_t cols) { return ceil_div(cols, 64) * 64; }

// x[rows][kTileCols] = Q_ib K_jb^T, summed in parts of the depth: one long chain of additions would round more than mm does.
template <class P>
void similarities(const Pairs<P>& p, int64_t ib, int64_t jb, acc_t<P>* x) {
  constexpr int64_t kPart = 512;
  for (int64_t d = 0; d < p.depth; d += kPart) {
    p.product(rows_of(p, ib), width_of(cols_of(p, jb)), min_(kPart, p.depth - d), p.depth, kTileCols, kTileCols, d > 0,
              p.q + ib * kTileRows * p.depth + d, p.kt + (jb * p.depth + d) * kTileCols, x);
  }
}

// D[rows][depth] = sum over jb of G_jb K_jb, where tile(jb) gives G_jb [rows][kTileCols], 0 beyond its columns.
template <class P, class Tile>
void query_product(const Pairs<P>& p, int64_t ib, Tile tile, acc_t<P>* out) {
  const int64_t rows = rows_of(p, ib);
  for (int64_t i = 0; p.m == 0 && i < rows * p.depth; ++i) out[i] = 0;
  for (int64_t jb = 0; jb < p.col_blocks(); ++jb) {
    const P* g = tile(jb);
    if constexpr (kPaired<P>) {
      p.product(rows, p.depth, kTileCols, kTileCols, p.depth, p.depth, jb > 0, g, p.k + jb * kTileCols * p.depth, out);
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
      tile(next, operand + (next - ib) * kTileRows * kTileCols);
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

// Two neighbouring elements of a B operand of paired rows.
struct alignas(4) Pair {
  uint32_t bits;
};
VLMK_INLINE void put_pair(float first, float second, Pair& out) {
  bf16 low, high;
  round_to(first, low);
  round_to(second, high);
  out.bits = static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16;
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

using Vector = uint32_t __attribute__((vector_size(64)));
template <int... J>
struct Words {};
using AllWords = Words<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;

// Indices into the 32 words of (upper row, lower row) that a stage takes for word j of each.
constexpr int upper_word(int s, int j) { return j & s ? 16 + j - s : j; }
constexpr int lower_word(int s, int j) { return j & s ? 16 + j : j + s; }

// One stage of transposing 16 rows of 16 words: swaps the off-diagonal blocks of size S of every pair of rows S apart.
template <int S, int... J>
VLMK_INLINE void swap_blocks(Vector (&row)[16], Words<J...>) {
  for (int i = 0; i < 16; ++i) {
    if (i & S) continue;
    const Vector upper = row[i], lower = row[i + S];
    row[i] = __builtin_shufflevector(upper, lower, upper_word(S, J)...);
    row[i + S] = __builtin_shufflevector(upper, lower, lower_word(S, J)...);
  }
}

// For every column c of x [rows][cols], words `ldx` apart, and 16 rows at a time: store16(c, r, words of rows r .. r + 15), and
// store1(c, r, word) for what is left.
template <class W, class Store16, class Store1>
void for_columns(const W* x, int64_t ldx, int64_t rows, int64_t cols, Store16 store16, Store1 store1) {
  static_assert(sizeof(W) == 4);
  const int64_t full_rows = rows / 16 * 16, full_cols = cols / 16 * 16;
  for (int64_t r = 0; r < full_rows; r += 16) {
    for (int64_t c = 0; c < full_cols; c += 16) {
      Vector block[16];
      for (int64_t i = 0; i < 16; ++i) __builtin_memcpy(&block[i], x + (r + i) * ldx + c, 64);
      swap_blocks<8>(block, AllWords());
      swap_blocks<4>(block, AllWords());
      swap_blocks<2>(block, AllWords());
      swap_blocks<1>(block, AllWords());
      for (int64_t i = 0; i < 16; ++i) store16(c + i, r, block[i]);
    }
    for (int64_t c = full_cols; c < cols; ++c) {
      for (int64_t i = r; i < r + 16; ++i) store1(c, i, x[i * ldx + c]);
    }
  }
  for (int64_t r = full_rows; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) store1(c, r, x[r * ldx + c]);
  }
}

// out[c][r] = x[r][c]
template <class W>
void transpose(const W* x, int64_t ldx, int64_t rows, int64_t cols, W* out, int64_t ldo) {
  if constexpr (sizeof(W) == 4) {
    for_columns(
        x, ldx, rows, cols, [&](int64_t c, int64_t r, Vector words) { __builtin_memcpy(out + c * ldo + r, &words, 64); },
        [&](int64_t c, int64_t r, W word) { out[c * ldo + r] = word; });
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) out[c * ldo + r] = x[r * ldx + c];
    }
  }
}

}  // namespace
}  // namespace vlmk::VLMK_ISA
