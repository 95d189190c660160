#include "vlmkernels/gated_linear_residual.h"

#include <type_traits>

#include "pairwise.h"

namespace vlmk::VLMK_ISA {
namespace {

// Calls done(block, tile) with each finished tile [rows][cols].
template <class P, class Done>
void for_tiles(const BlockProduct<P>& p, Done done) {
  const bool packed = p.ldb == p.cols, parts = p.depth > kPart;
  const int64_t size = p.rows * p.cols;
  for (int64_t e = 0; e < p.depth; e += kPart) {
    const int64_t depth = min_(kPart, p.depth - e);
    const P* a = p.a + e / kPart * p.a_step;
    int64_t lda = p.lda;
    if constexpr (kPaired<P>) {  // rows that are whole pages apart share cache lines
      if (parts && p.part) {
        lda = kPart + 32;
        for (int64_t r = 0; r < p.rows; ++r) __builtin_memcpy(p.part + r * lda, a + r * p.lda, depth * sizeof(P));
        a = p.part;
      }
    }
    for (int64_t j = p.first; j < p.last; ++j) {
      acc_t<P>* tile = p.tiles + (parts ? (j - p.first) * size : 0);
      const P* b = packed ? p.b + (j * p.depth + e) * p.cols : p.b + e * p.ldb + j * p.cols;
      p.product(p.rows, packed ? p.cols : min_(p.cols, p.ldb - j * p.cols), depth, lda, p.ldb, p.cols, e > 0, a, b, tile);
      if (e + depth == p.depth) done(j, tile);
    }
  }
}

// out = x + t branch for `cols` channels from d0 on; the branch has rows of `ld`.
template <class P, class T>
void add_branch(const GatedLinear<P, T>& g, const acc_t<P>* branch, int64_t ld, int64_t row, int64_t count, int64_t d0,
                int64_t cols) {
  const acc_t<P>* t = g.t + d0;
  for (int64_t r = row; r < row + count; ++r, branch += ld) {
    const int64_t at = (g.index ? g.index[r] : r) * g.d + d0;
    const T* x = g.x + at;
    T* out = g.out + at;
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) from_acc(to_acc(x[c]) + t[c] * branch[c], out[c]);
  }
}

}  // namespace

template <class S, class P>
void load_rows(const S* x, const int64_t* index, int64_t count, int64_t d, int64_t rows, int64_t depth, P* out) {
  for (int64_t i = 0; i < rows; ++i, out += depth) {
    const int64_t loaded = i < count ? d : 0;
    const S* row = i < count ? x + (index ? index[i] : i) * d : x;
    if constexpr (std::is_same_v<S, P>) {
      for (int64_t c = 0; c < loaded; ++c) out[c] = row[c];
    } else {
#pragma omp simd
      for (int64_t c = 0; c < loaded; ++c) from_acc(static_cast<acc_t<P>>(to_acc(row[c])), out[c]);
    }
    for (int64_t c = loaded; c < depth; ++c) out[c] = P{};
  }
}

template <class P>
void pack_columns_b(const P* w, int64_t ldw, const acc_t<P>* t, int64_t count, int64_t d, int64_t depth, P* out) {
  constexpr int64_t cols = kBlockCols<P>;
  if constexpr (kPaired<P>) {
    for (int64_t i = 0; i < depth; i += 2, out += 2 * cols) {
      auto* pairs = reinterpret_cast<Pair*>(out);
      const P *first = w + i * ldw, *second = first + ldw;
      const acc_t<P> t0 = t && i < d ? t[i] : 1, t1 = t && i + 1 < d ? t[i + 1] : 1;
      if (i + 1 < d && t) {
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) put_pair(t0 * to_acc(first[c]), t1 * to_acc(second[c]), pairs[c]);
      } else if (i + 1 < d) {
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) {
          pairs[c].bits = static_cast<uint32_t>(first[c].bits) | static_cast<uint32_t>(second[c].bits) << 16;
        }
      } else if (i < d) {
        for (int64_t c = 0; c < count; ++c) put_pair(t0 * to_acc(first[c]), 0.0f, pairs[c]);
      }
      for (int64_t c = i < d ? count : 0; c < cols; ++c) pairs[c] = {};
    }
  } else {
    for (int64_t i = 0; i < depth; ++i, w += ldw, out += cols) {
      const P scale = t && i < d ? t[i] : P(1);
      const int64_t loaded = i < d ? count : 0;
#pragma omp simd
      for (int64_t c = 0; c < loaded; ++c) out[c] = scale * w[c];
      for (int64_t c = loaded; c < cols; ++c) out[c] = P{};
    }
  }
}

template <class P, class T>
void gated_linear_residual(const BlockProduct<P>& p, const GatedLinear<P, T>& g, int64_t row, int64_t count) {
  for_tiles(p, [&](int64_t j, const acc_t<P>* tile) {
    add_branch(g, tile, p.cols, row, count, j * p.cols, min_(p.cols, g.d - j * p.cols));
  });
}

template <class P, class T>
void gated_linear_residual_few(const BlockProduct<P>& p, const GatedLinear<P, T>& g, int64_t d0, int64_t count, int64_t rows,
                               acc_t<P>* turned) {
  for_tiles(p, [&](int64_t j, const acc_t<P>* tile) {
    const int64_t row = j * p.cols, of = min_(p.cols, rows - row);
    transpose(tile, p.cols, count, of, turned, count);
    add_branch(g, turned, count, row, of, d0, count);
  });
}

template <class P, class T>
void gated_linear_residual_row(const GatedLinear<P, T>& g, const P* h, int64_t row, const P* w, int64_t depth, int64_t d0,
                               int64_t count) {
  using A = acc_t<P>;
  for (int64_t d = 0; d < count; d += 4) {  // sums that do not wait for one another
    const int64_t last = count - 1 - d;
    const P *w0 = w + d * depth, *w1 = w0 + min_<int64_t>(1, last) * depth, *w2 = w0 + min_<int64_t>(2, last) * depth,
            *w3 = w0 + min_<int64_t>(3, last) * depth;
    A branch[4] = {};
    for (int64_t e = 0; e < depth; e += kPart) {
      const int64_t end = min_(e + kPart, depth);
      A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
      for (int64_t c = e; c < end; ++c) {
        const A x = to_acc(h[c]);
        s0 += x * to_acc(w0[c]), s1 += x * to_acc(w1[c]), s2 += x * to_acc(w2[c]), s3 += x * to_acc(w3[c]);
      }
      branch[0] += s0, branch[1] += s1, branch[2] += s2, branch[3] += s3;
    }
    add_branch(g, branch, 4, row, 1, d0 + d, min_<int64_t>(4, count - d));
  }
}

template <class P, class T>
void gated_linear_residual_dh(const BlockProduct<P>& p, const GatedLinearInput<P, T>& g, int64_t row, int64_t count) {
  using A = acc_t<P>;
  for_tiles(p, [&](int64_t j, const A* tile) {
    const int64_t k0 = j * p.cols, cols = min_(p.cols, g.k - k0);
    double sum = 0;
    for (int64_t r = row; r < row + count; ++r, tile += p.cols) {
      const int64_t at = (g.index ? g.index[r] : r) * g.k + k0;
      if (g.h) {
        const T* h = g.h + at;
        A dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t c = 0; c < cols; ++c) dot += tile[c] * to_acc(h[c]);
        sum += dot;
      }
      T* dh = g.dh + at;
#pragma omp simd
      for (int64_t c = 0; c < cols; ++c) from_acc(g.t * tile[c], dh[c]);
    }
    if (g.h) g.dots[row / kBlockRows<P> * ceil_div(g.k, p.cols) + j] = sum;
  });
}

template <class P, class T>
void gated_linear_residual_dw(const BlockProduct<P>& p, const GatedLinearWeight<P, T>& g, int64_t d0, int64_t count, bool add,
                              bool finish) {
  using A = acc_t<P>;
  for_tiles(p, [&](int64_t j, A* tile) {
    const int64_t k0 = j * p.cols, cols = min_(p.cols, g.k - k0);
    for (int64_t d = d0; d < d0 + count; ++d, tile += p.cols) {
      const int64_t at = d * g.k + k0;
      A* products = g.products + at;
#pragma omp simd
      for (int64_t c = 0; c < (add ? cols : 0); ++c) tile[c] += products[c];
      if (!finish) {
        for (int64_t c = 0; c < cols; ++c) products[c] = tile[c];
        continue;
      }
      if (g.weight) {
        const T* weight = g.weight + at;
        A dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t c = 0; c < cols; ++c) dot += tile[c] * to_acc(weight[c]);
        g.part[j * g.d + d] = dot;
      }
      if (g.dweight) {
        T* dweight = g.dweight + at;
        const A t = g.t[d];
#pragma omp simd
        for (int64_t c = 0; c < cols; ++c) from_acc(t * tile[c], dweight[c]);
      }
    }
  });
}

#define VLMK_LOAD(P)                                                                              \
  template void load_rows(const float*, const int64_t*, int64_t, int64_t, int64_t, int64_t, P*);  \
  template void load_rows(const double*, const int64_t*, int64_t, int64_t, int64_t, int64_t, P*); \
  template void load_rows(const bf16*, const int64_t*, int64_t, int64_t, int64_t, int64_t, P*);   \
  template void load_rows(const f16*, const int64_t*, int64_t, int64_t, int64_t, int64_t, P*);    \
  template void pack_columns_b(const P*, int64_t, const acc_t<P>*, int64_t, int64_t, int64_t, P*);
#define VLMK_INSTANTIATE(P, T)                                                                                           \
  template void gated_linear_residual(const BlockProduct<P>&, const GatedLinear<P, T>&, int64_t, int64_t);               \
  template void gated_linear_residual_few(const BlockProduct<P>&, const GatedLinear<P, T>&, int64_t, int64_t, int64_t,   \
                                          acc_t<P>*);                                                                    \
  template void gated_linear_residual_dh(const BlockProduct<P>&, const GatedLinearInput<P, T>&, int64_t, int64_t);       \
  template void gated_linear_residual_dw(const BlockProduct<P>&, const GatedLinearWeight<P, T>&, int64_t, int64_t, bool, \
                                         bool);                                                                          \
  template void gated_linear_residual_row(const GatedLinear<P, T>&, const P*, int64_t, const P*, int64_t, int64_t, int64_t);
VLMK_LOAD(float)
VLMK_LOAD(double)
VLMK_LOAD(bf16)
VLMK_INSTANTIATE(double, double)
VLMK_INSTANTIATE(float, float)
VLMK_INSTANTIATE(float, bf16)
VLMK_INSTANTIATE(float, f16)
VLMK_INSTANTIATE(bf16, bf16)
VLMK_INSTANTIATE(bf16, float)

}  // namespace vlmk::VLMK_ISA
