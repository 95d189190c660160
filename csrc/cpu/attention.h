#pragma once
// What the forward and the backward of attention share: who sees what, and operands. Tiles are transposed, [keys][queries].
#include "pack.h"
#include "vector.h"
#include "vlmkernels/attention.h"
#include "vlmkernels/scratch.h"

namespace vlmk::VLMK_ISA {
namespace {

template <class A>
constexpr A kNothing = -__builtin_inf();

template <class T>
T* row_of(const Tokens<T>& x, int64_t b, int64_t h, int64_t t) {
  return x.data + b * x.batch + h * x.head + t * x.token;
}

// Rows as an A operand [block][depth], or a B operand of unpaired rows; zero padded.
template <class P>
void copy_rows(const P* x, int64_t ldx, int64_t count, int64_t d, int64_t depth, int64_t block, P* out) {
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t c = 0; c < d; ++c) out[r * depth + c] = x[r * ldx + c];
    for (int64_t c = d; c < depth; ++c) out[r * depth + c] = P{};
  }
  for (int64_t i = count * depth; i < block * depth; ++i) out[i] = P{};
}

// Rows as the B operand of a product that sums over them.
template <class P>
void rows_as_b(const P* x, int64_t ldx, int64_t count, int64_t d, int64_t depth, int64_t block, P* out) {
  if constexpr (kPaired<P>) {
    pack_rows_b(x, ldx, count, d, depth, block, out);
  } else {
    copy_rows(x, ldx, count, d, depth, block, out);
  }
}

// What the rows of a query block see of a source: all of [inner_lo, inner_hi), nothing outside [lo, hi).
struct Span {
  int64_t lo, hi, inner_lo, inner_hi;
};
inline Span span_of(const int32_t* begin, const int32_t* end, int64_t rows) {
  Span span{INT32_MAX, 0, 0, INT32_MAX};
  for (int64_t r = 0; r < rows; ++r) {
    span.inner_lo = begin[r] < end[r] ? max_<int64_t>(span.inner_lo, begin[r]) : INT32_MAX;
    span.inner_hi = min_<int64_t>(span.inner_hi, end[r]);
    if (begin[r] >= end[r]) continue;
    span.lo = min_<int64_t>(span.lo, begin[r]);
    span.hi = max_<int64_t>(span.hi, end[r]);
  }
  if (span.hi == 0) span.lo = 0;
  return span;
}

// The keys [c0, c1) of the block at j0 that a span touches, in units: those of paired operands are whole tiles of AMX.
struct Columns {
  int64_t c0, c1;
};
template <class P>
Columns columns_of(const Span& span, int64_t j0, int64_t block) {
  constexpr int64_t unit = kPaired<P> ? kKeyUnit : Vectors<float>::lanes;
  return {max_<int64_t>(span.lo - j0, 0) / unit * unit, min_(round_up(span.hi - j0, unit), block)};
}

// Queries of a tile's row: whole vectors, and few distinct shapes of products.
template <class P>
int64_t tile_width(int64_t queries) {
  return round_up(queries, kPaired<P> ? kUnit : Vectors<float>::lanes);
}

template <class P>
int64_t table_size(const Attention<P>& g) {
  return (2 * g.grid_rows - 1) * (2 * g.grid_cols - 1);
}

// Calls f(x, entry, run) for runs of queries [i0 + x, i0 + x + run) of [i0, i1) whose biases for key j begin at `entry`.
template <class P, class F>
void for_query_runs(const Attention<P>& g, int64_t i0, int64_t i1, int64_t j, F f) {
  const int64_t rows = g.grid_rows, cols = g.grid_cols, last = min_(i1, rows * cols);
  if (j >= rows * cols) return;
  for (int64_t i = i0; i < last;) {
    const int64_t run = min_(cols - i % cols, last - i);
    f(i - i0, (i / cols - j / cols + rows - 1) * (2 * cols - 1) + i % cols - j % cols + cols - 1, run);
    i += run;
  }
}

// Where the queries of a block see keys, for comparison with a key's index; queries past the last see none.
template <class A>
void bounds_of(const int32_t* begin, const int32_t* end, int64_t rows, typename Vectors<A>::Index* from,
               typename Vectors<A>::Index* to) {
  for (int64_t r = 0; r < kQueryBlock; ++r) {
    from[r] = r < rows ? begin[r] : 0;
    to[r] = r < rows ? end[r] : 0;
  }
}
template <class A>
VLMK_INLINE IndexVec<A> sees(const typename Vectors<A>::Index* from, const typename Vectors<A>::Index* to, int64_t j) {
  const auto key = static_cast<typename Vectors<A>::Index>(j);
  return (load<IndexVec<A>>(from) <= key) & (load<IndexVec<A>>(to) > key);
}

// Forward and backward round a logit alike: a key that is seen alone must get p = exp(s - lse) = 1. Queries of full precision
// carry the scale, and a logit is what the product gives; in bf16 they have no digits for it, and the product gets the factor.
template <class P>
VLMK_INLINE Vec<acc_t<P>> logits_at(const acc_t<P>* products, acc_t<P> factor) {
  const auto s = load<Vec<acc_t<P>>>(products);
  return kPaired<P> ? s * factor : s;
}

// The queries of a block as B operand of the logits.
template <class P>
void pack_queries(const Attention<P>& g, const P* query, int64_t rows, int64_t width, P* qt) {
  pack_transposed_b(query, g.q.token, rows, g.dh, g.depth, width, qt);
  if constexpr (!kPaired<P>) {
#pragma omp simd
    for (int64_t i = 0; i < g.depth * width; ++i) qt[i] *= g.scale;
  }
}

// Products become logits with their biases, for keys [j0, j0 + keys) and the queries from q0 on.
template <class P>
void add_bias(const Attention<P>& g, const acc_t<P>* table, int64_t q0, int64_t rows, int64_t width, int64_t j0, int64_t keys,
              acc_t<P> factor, acc_t<P>* s) {
  for (int64_t j = j0; j < j0 + keys; ++j, s += width) {
    for (int64_t i = 0; kPaired<P> && i < width; ++i) s[i] *= factor;
    for_query_runs(g, q0, q0 + rows, j, [&](int64_t x, int64_t entry, int64_t run) {
      for (int64_t i = 0; i < run; ++i) s[x + i] += table[entry + i];
    });
  }
}

// Rows are read in steps: one vector of features, or for bf16 the even and the odd ones of twice as many, each a vector.
template <class P>
constexpr int64_t kHalves = kPaired<P> ? 2 : 1;
template <class P>
constexpr int64_t kStep = kHalves<P> * Vectors<acc_t<P>>::lanes;

// Where rows of d features hold feature c when their whole steps are in the order of the vectors.
template <class P>
int64_t place_in(int64_t c, int64_t d) {
  constexpr int64_t step = kStep<P>;
  if (!kPaired<P> || c >= d / step * step) return c;
  return c / step * step + c % 2 * (step / 2) + c % step / 2;
}

}  // namespace

// One of a few queries as `few_logits` reads it: scaled, the features of whole steps in their places.
template <class P>
void pack_query(const Attention<P>& g, const P* query, acc_t<P>* q);
// s[x] = <q, k_x> for the rows k_x of x < count, `ld` apart.
template <class P>
void few_logits(const acc_t<P>* q, const P* k, int64_t ld, int64_t count, int64_t d, acc_t<P>* s);

}  // namespace vlmk::VLMK_ISA
