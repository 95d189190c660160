#include "vlmkernels/sigmoid_loss.h"

#include "pairwise.h"

namespace vlmk::VLMK_ISA {
namespace {

struct Sums {
  double loss = 0, dbias = 0, dscale = 0;
};

// One row of a tile: x holds similarities before normalisation, t_ij = sign[c].
template <bool kLoss, bool kGrad, class P>
void row_of_tile(const SigmoidLoss<P>& g, int64_t i, int64_t cols, const acc_t<P>* x, const acc_t<P>* b, const acc_t<P>* sign,
                 P* out, Sums& sums) {
  using A = acc_t<P>;
  const A a = g.pairs.a ? g.pairs.a[i] : A(1), u = g.row_coef[i], scale = g.pairs.scale, bias = g.bias;
  for (int64_t c0 = 0; c0 < cols; c0 += kSumPart) {
    // The few large addends of the loss have a sum of their own: in it the many small ones would lose their digits.
    A linear = 0, l = 0, db = 0, ds = 0;
#pragma omp simd reduction(+ : linear, l, db, ds)
    for (int64_t c = c0; c < min_(c0 + kSumPart, cols); ++c) {
      const A similarity = x[c] * a * b[c], z = scale * similarity + bias;
      const A t = sign[c], y = -t * z;  // the loss of a pair is softplus(y)
      const A e = exp_(y < 0 ? y : -y), inverse = A(1) / (A(1) + e);
      if constexpr (kLoss) {
        linear += y > 0 ? y : A(0);
        l += log1p_(e);
      }
      if constexpr (kGrad) {
        const A dz = -t * u * (y < 0 ? e * inverse : inverse);
        db += dz;
        ds += dz * similarity;
        round_to(dz, out[c]);
      }
    }
    sums.loss += linear;
    sums.loss += l;
    sums.dbias += db;
    sums.dscale += ds;
  }
}

}  // namespace

template <class P>
void sigmoid_loss_tiles(const SigmoidLoss<P>& g, int64_t ib, int64_t col_chunk, acc_t<P>* x) {
  using A = acc_t<P>;
  const Pairs<P>& p = g.pairs;
  const int64_t i0 = ib * kTileRows, rows = rows_of(p, ib), at = col_chunk * p.n + i0;
  const int64_t jb0 = col_chunk * g.chunk_cols, jb1 = min_(jb0 + g.chunk_cols, p.col_blocks());
  Sums sums[kTileRows];
  A sign[kTileCols], ones[kTileCols];
  for (int64_t c = 0; c < kTileCols; ++c) sign[c] = -1, ones[c] = 1;
  for (int64_t jb = jb0; jb < jb1; ++jb) {
    const int64_t j0 = jb * kTileCols, cols = cols_of(p, jb);
    P* tile = g.need_grad ? g.tiles + ((ib - g.first) * p.col_blocks() + jb) * kTileSize : nullptr;
    similarities(p, ib, jb, x);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = i0 + r, positive = g.positives ? g.positives[i] - j0 : -1;
      const bool here = positive >= 0 && positive < cols;
      if (here) sign[positive] = 1;
      for (int64_t c = 0; g.query_ids && c < cols; ++c) sign[c] = g.query_ids[i] == g.key_ids[j0 + c] ? A(1) : A(-1);
      const A *row = x + r * kTileCols, *b = p.b ? p.b + j0 : ones;
      P* out = tile ? tile + r * kTileCols : nullptr;
      if (g.need_loss && g.need_grad) {
        row_of_tile<true, true>(g, i, cols, row, b, sign, out, sums[r]);
      } else if (g.need_grad) {
        row_of_tile<false, true>(g, i, cols, row, b, sign, out, sums[r]);
      } else {
        row_of_tile<true, false>(g, i, cols, row, b, sign, out, sums[r]);
      }
      if (here) sign[positive] = -1;
      for (int64_t c = cols; out && c < kTileCols; ++c) out[c] = P{};
    }
    for (int64_t i = rows * kTileCols; tile && i < kTileSize; ++i) tile[i] = P{};
  }
  for (int64_t r = 0; r < rows; ++r) {
    g.loss[at + r] = static_cast<A>(sums[r].loss);
    g.dbias[at + r] = static_cast<A>(sums[r].dbias);
    g.dscale[at + r] = static_cast<A>(sums[r].dscale);
  }
}

template <class P>
void sigmoid_loss_query(const SigmoidLoss<P>& g, int64_t ib, acc_t<P>* sums, P* operand) {
  const Pairs<P>& p = g.pairs;
  query_product(
      p, ib,
      [&](int64_t jb) {
        const P* tile = g.tiles + ((ib - g.first) * p.col_blocks() + jb) * kTileSize;
        if (!p.b) return tile;
        const int64_t cols = cols_of(p, jb);
        const acc_t<P>* b = p.b + jb * kTileCols;
        for (int64_t r = 0; r < rows_of(p, ib); ++r) {
          const P* row = tile + r * kTileCols;
          P* out = operand + r * kTileCols;
#pragma omp simd
          for (int64_t c = 0; c < cols; ++c) round_to(to_acc(row[c]) * b[c], out[c]);
          for (int64_t c = cols; c < kTileCols; ++c) out[c] = P{};
        }
        return static_cast<const P*>(operand);
      },
      sums);
  for (int64_t r = 0; r < rows_of(p, ib); ++r) finish_row(g.query, ib * kTileRows + r, p.d, p.scale, sums + r * p.depth);
}

template <class P>
void sigmoid_loss_key(const SigmoidLoss<P>& g, int64_t jb, int64_t d0, int64_t d1, bool accumulate, P* operand) {
  const Pairs<P>& p = g.pairs;
  key_product(
      p, jb, g.first, g.last, d0, d1, accumulate, operand,
      [&](int64_t ib, P* to) {
        const P* tile = g.tiles + ((ib - g.first) * p.col_blocks() + jb) * kTileSize;
        if (!p.a && !kPaired<P>) return tile;
        const int64_t rows = rows_of(p, ib);
        for (int64_t r = 0; r < rows; r += 2) {
          const acc_t<P>* a = p.a ? p.a + ib * kTileRows + r : nullptr;
          const acc_t<P> first = a ? a[0] : acc_t<P>(1), second = a && r + 1 < rows ? a[1] : acc_t<P>(1);
          const P *x = tile + r * kTileCols, *y = x + kTileCols;  // a row beyond the tile's own holds zeros
          P* out = to + r * kTileCols;
          if constexpr (kPaired<P>) {
            Pair* pairs = reinterpret_cast<Pair*>(out);
#pragma omp simd
            for (int64_t c = 0; c < kTileCols; ++c) put_pair(first * to_acc(x[c]), second * to_acc(y[c]), pairs[c]);
          } else {
#pragma omp simd
            for (int64_t c = 0; c < kTileCols; ++c) out[c] = first * x[c], out[kTileCols + c] = second * y[c];
          }
        }
        return static_cast<const P*>(to);
      },
      g.key_sums + jb * p.d * kTileCols);
}

template <class P>
void sigmoid_loss_finish_key(const SigmoidLoss<P>& g, int64_t jb, acc_t<P>* rows) {
  const Pairs<P>& p = g.pairs;
  const int64_t cols = cols_of(p, jb);
  transpose<acc_t<P>>(g.key_sums + jb * p.d * kTileCols, kTileCols, p.d, cols, rows, p.d);
  for (int64_t c = 0; c < cols; ++c) finish_row(g.key, jb * kTileCols + c, p.d, p.scale, rows + c * p.d);
}

#define VLMK_INSTANTIATE(P)                                                                   \
  template void sigmoid_loss_tiles(const SigmoidLoss<P>&, int64_t, int64_t, acc_t<P>*);       \
  template void sigmoid_loss_query(const SigmoidLoss<P>&, int64_t, acc_t<P>*, P*);            \
  template void sigmoid_loss_key(const SigmoidLoss<P>&, int64_t, int64_t, int64_t, bool, P*); \
  template void sigmoid_loss_finish_key(const SigmoidLoss<P>&, int64_t, acc_t<P>*);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)

}  // namespace vlmk::VLMK_ISA
