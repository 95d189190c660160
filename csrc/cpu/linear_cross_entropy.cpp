#include "vlmkernels/linear_cross_entropy.h"

#include "pairwise.h"

namespace vlmk::VLMK_ISA {
namespace {

template <class A>
constexpr A kNone = sizeof(A) == 8 ? A(-745) : A(-87);

// Turns the products of a tile's rows [rows][kTileCols] into logits and takes in their maxima over the rows.
template <class P>
void logits_in_place(const LinearCrossEntropy<P>& g, int64_t ib, int64_t cols, acc_t<P>* z, acc_t<P>* top, acc_t<P>* total) {
  using A = acc_t<P>;
  const int64_t rows = rows_of(g.pairs, ib), j0 = ib * kTileRows;
  for (int64_t r0 = 0; r0 < rows; r0 += kSumRows) {
    A some[kTileCols];
    for (int64_t c = 0; c < cols; ++c) some[c] = 0;
    for (int64_t r = r0; r < min_(r0 + kSumRows, rows); ++r) {
      const A bias = g.bias ? g.bias[j0 + r] : A(0), scale = g.class_scale ? g.class_scale[j0 + r] : A(1);
      A* row = z + r * kTileCols;
#pragma omp simd
      for (int64_t c = 0; c < cols; ++c) {
        const A x = (row[c] + bias) * scale;
        row[c] = x;
        top[c] = max_(top[c], x);
        some[c] += x;
      }
    }
    for (int64_t c = 0; total && c < cols; ++c) total[c] += some[c];
  }
}

}  // namespace

template <class P>
void linear_cross_entropy_logits(const LinearCrossEntropy<P>& g, int64_t class_chunk, int64_t jb, acc_t<P>* scratch) {
  using A = acc_t<P>;
  const Pairs<P>& p = g.pairs;
  const int64_t i0 = jb * kTileCols, cols = cols_of(p, jb), at = class_chunk * p.m + i0;
  const int64_t ib0 = class_chunk * g.chunk_classes, ib1 = min_(ib0 + g.chunk_classes, p.row_blocks());
  A top[kTileCols], before[kTileCols], shift[kTileCols], some[kTileCols], total[kTileCols];
  double sum[kTileCols];
  for (int64_t c = 0; c < cols; ++c) top[c] = -__builtin_inf(), sum[c] = total[c] = 0;
  for (int64_t ib = ib0; ib < ib1; ++ib) {
    A* z = g.tiles ? g.logits(ib, jb) : scratch;
    const int64_t rows = rows_of(p, ib), j0 = ib * kTileRows;
    similarities(p, ib, jb, z);
    for (int64_t c = 0; c < cols; ++c) before[c] = top[c];
    logits_in_place(g, ib, cols, z, top, g.smoothing > 0 ? total : nullptr);
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t r = g.target[i0 + c] - j0;
      if (r >= 0 && r < rows) g.target_logit[i0 + c] = z[r * kTileCols + c];
      if (before[c] != top[c]) sum[c] *= exp_(before[c] - top[c]);
      shift[c] = top[c] == A(-__builtin_inf()) ? A(0) : top[c];  // exp_(-inf), not NaN, where no class can be
    }
    for (int64_t r0 = 0; r0 < rows; r0 += kSumRows) {
      for (int64_t c = 0; c < cols; ++c) some[c] = 0;
      for (int64_t r = r0; r < min_(r0 + kSumRows, rows); ++r) {
        const A* row = z + r * kTileCols;
#pragma omp simd
        for (int64_t c = 0; c < cols; ++c) some[c] += exp_(row[c] - shift[c]);
      }
      for (int64_t c = 0; c < cols; ++c) sum[c] += some[c];
    }
  }
  for (int64_t c = 0; c < cols; ++c) {
    g.max[at + c] = top[c];
    g.sum[at + c] = static_cast<A>(sum[c]);
    if (g.smoothing > 0) g.total[at + c] = total[c];
  }
}

template <class P>
void linear_cross_entropy_rows(const LinearCrossEntropy<P>& g, int64_t jb) {
  using A = acc_t<P>;
  const Pairs<P>& p = g.pairs;
  const int64_t chunks = ceil_div(p.row_blocks(), g.chunk_classes);
  for (int64_t i = jb * kTileCols; i < jb * kTileCols + cols_of(p, jb); ++i) {
    A top = -__builtin_inf();
    for (int64_t chunk = 0; chunk < chunks; ++chunk) top = max_(top, g.max[chunk * p.m + i]);
    double sum = 0, total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const A part = g.sum[chunk * p.m + i];
      if (part != 0) sum += std::exp(static_cast<double>(g.max[chunk * p.m + i]) - top) * part;
      if (g.smoothing > 0) total += g.total[chunk * p.m + i];
    }
    const double log = std::log(sum), e = g.smoothing;
    g.row_max[i] = top;
    g.row_log[i] = static_cast<A>(log);
    double loss = (1 - e) * ((top - static_cast<double>(g.target_logit[i])) + log);
    if (g.smoothing > 0) loss += e * ((top - total / static_cast<double>(p.n)) + log);
    g.loss[i] = static_cast<A>(loss);
  }
}

namespace {

// Turns the logits of class block ib into gradients, unless they are, rounded to `out` [kTileRows][kTileCols] and, for operands
// of paired rows, to `paired`: the columns that products read. `out` may begin where the logits do, or before.
template <class P>
void gradients_of(const LinearCrossEntropy<P>& g, int64_t ib, int64_t jb, P* out, P* paired) {
  using A = acc_t<P>;
  const Pairs<P>& p = g.pairs;
  const int64_t rows = rows_of(p, ib), cols = cols_of(p, jb), width = width_of(cols), j0 = ib * kTileRows, i0 = jb * kTileCols;
  const A *u = g.row_coef + i0, *top = g.row_max + i0, *log = g.row_log + i0;
  const A low = g.smoothing / static_cast<A>(p.n), high = A(1) - g.smoothing;
  const A* z = g.logits(ib, jb);
  int32_t row_of_target[kTileCols];
  for (int64_t c = 0; !g.formed && c < cols; ++c) {
    const int64_t r = g.target[i0 + c] - j0;
    row_of_target[c] = r >= 0 && r < rows ? static_cast<int32_t>(r) : -1;
  }
  A dz[2][kTileCols];
  for (int64_t r = 0; r < rows; ++r) {
    const A scale = g.class_scale ? g.class_scale[j0 + r] : A(1);
    const A* row = z + r * kTileCols;
    A* to = dz[r % 2];
    if (g.formed) {
      for (int64_t c = 0; c < cols; ++c) to[c] = row[c];
    } else {
#pragma omp simd
      for (int64_t c = 0; c < cols; ++c) {
        const A target = row_of_target[c] == static_cast<int32_t>(r) ? high : A(0);
        const A below = (row[c] - top[c]) - log[c];  // exp_ ends above 0, and a class that cannot be gets no gradient
        to[c] = ((below < kNone<A> ? A(0) : exp_(below)) - low - target) * u[c] * scale;
      }
    }
    for (int64_t c0 = 0; g.need_bias && c0 < cols; c0 += kSumPart) {
      A some = 0;
#pragma omp simd reduction(+ : some)
      for (int64_t c = c0; c < min_(c0 + kSumPart, cols); ++c) some += to[c];
      g.bias_sums[j0 + r] += some;
    }
    for (int64_t c = cols; c < width; ++c) to[c] = 0;
    P* rounded = out + r * kTileCols;
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) round_to(to[c], rounded[c]);
    if constexpr (kPaired<P>) {
      if (r % 2 == 0 && r + 1 < rows) continue;
      for (int64_t c = 0; r % 2 == 0 && c < width; ++c) dz[1][c] = 0;
      Pair* pairs = reinterpret_cast<Pair*>(paired + r / 2 * 2 * kTileCols);
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) put_pair(dz[0][c], dz[1][c], pairs[c]);
    }
  }
  for (int64_t i = rows * kTileCols; i < kTileSize; ++i) out[i] = P{};
  if constexpr (kPaired<P>) {
    for (int64_t i = round_up(rows, 2) * kTileCols; i < kTileSize; ++i) paired[i] = P{};
  }
}

}  // namespace

template <class P>
void linear_cross_entropy_classes(const LinearCrossEntropy<P>& g, int64_t classes, P* operand, acc_t<P>* sums) {
  using A = acc_t<P>;
  const Pairs<P>& p = g.pairs;
  const int64_t ib0 = classes * g.group, ib1 = min_(ib0 + g.group, p.row_blocks()), j0 = ib0 * kTileRows;
  const int64_t rows = min_(g.group * kTileRows, p.n - j0);
  for (int64_t r = 0; g.first == 0 && g.need_bias && r < rows; ++r) g.bias_sums[j0 + r] = 0;
  A* to = g.weight_sums ? g.weight_sums + j0 * p.depth : sums;
  for (int64_t jb = g.first; jb < g.last; ++jb) {
    P* dz = g.gradients(classes, jb);
    for (int64_t ib = ib0; ib < ib1; ++ib) {
      const int64_t at = (ib - ib0) * kTileSize;
      gradients_of(g, ib, jb, dz + at, operand + at);
    }
    if constexpr (kPaired<P>) {
      for (int64_t i = (ib1 - ib0) * kTileSize; i < g.group * kTileSize; ++i) operand[i] = P{};
      const int64_t pairs = 2 * width_of(cols_of(p, jb));
      for (int64_t i = 0; g.need_hidden && i < g.group * kTileSize; i += 2 * kTileCols) {
        __builtin_memcpy(dz + g.group * kTileSize + i, operand + i, pairs * sizeof(P));
      }
      if (g.need_weight) {
        const P* h = p.k + jb * kTileCols * p.depth;
        p.product(rows, p.depth, whole_units(cols_of(p, jb)), kTileCols, p.depth, p.depth, jb > 0, dz, h, to);
      }
    } else if (g.need_weight) {
      p.product(rows, p.d, cols_of(p, jb), kTileCols, p.d, p.depth, jb > 0, dz, p.k + jb * kTileCols * p.d, to);
    }
  }
  if (!g.need_weight || g.last < p.col_blocks()) return;
  for (int64_t r = 0; r < rows; ++r) {
    P* dw = g.dweight + (j0 + r) * p.d;
    const A* from = to + r * p.depth;
    if (static_cast<const void*>(from) == dw) continue;
#pragma omp simd
    for (int64_t c = 0; c < p.d; ++c) from_acc(from[c], dw[c]);
  }
}

template <class P>
void linear_cross_entropy_hidden(const LinearCrossEntropy<P>& g, int64_t jb0, int64_t jb1, int64_t d0, int64_t d1,
                                 acc_t<P>* sums, P* operand) {
  using A = acc_t<P>;
  constexpr int64_t group_rows = LinearCrossEntropy<P>::group * kTileRows;
  const Pairs<P>& p = g.pairs;
  const int64_t width = d1 - d0;
  for (int64_t classes = 0; classes < g.groups(); ++classes) {
    const int64_t j0 = classes * group_rows, rows = min_(group_rows, p.n - j0);
    pack_transposed_a(p.q + j0 * p.depth + d0, p.depth, rows, width, group_rows, operand);
    for (int64_t jb = jb0; jb < jb1; ++jb) {
      const P* dz = g.gradients(classes, jb) + (kPaired<P> ? g.group * kTileSize : 0);
      p.product(width, width_of(cols_of(p, jb)), kPaired<P> ? group_rows : rows, group_rows, kTileCols, kTileCols, classes > 0,
                operand, dz, sums + (jb - jb0) * width * kTileCols);
    }
  }
  A* rows = sums + (jb1 - jb0) * width * kTileCols;
  for (int64_t jb = jb0; jb < jb1; ++jb) {
    transpose<A>(sums + (jb - jb0) * width * kTileCols, kTileCols, width, cols_of(p, jb), rows, width);
    for (int64_t c = 0; c < cols_of(p, jb); ++c) {
      P* dh = g.dhidden + (jb * kTileCols + c) * p.d + d0;
      const A* from = rows + c * width;
#pragma omp simd
      for (int64_t x = 0; x < width; ++x) from_acc(from[x], dh[x]);
    }
  }
}

#define VLMK_INSTANTIATE(P)                                                                             \
  template void linear_cross_entropy_logits(const LinearCrossEntropy<P>&, int64_t, int64_t, acc_t<P>*); \
  template void linear_cross_entropy_rows(const LinearCrossEntropy<P>&, int64_t);                       \
  template void linear_cross_entropy_classes(const LinearCrossEntropy<P>&, int64_t, P*, acc_t<P>*);     \
  template void linear_cross_entropy_hidden(const LinearCrossEntropy<P>&, int64_t, int64_t, int64_t, int64_t, acc_t<P>*, P*);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)

}  // namespace vlmk::VLMK_ISA
