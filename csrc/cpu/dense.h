#pragma once
// The loop over the tiles of a block of rows.
#include "pack.h"
#include "vlmkernels/dense.h"

namespace vlmk::VLMK_ISA {
namespace {

// Calls done(block, tile) with each finished tile [rows][cols].
template <class P, class Done>
void for_tiles(const BlockProduct<P>& p, Done done) {
  const bool packed = p.ldb == p.cols, parts = p.depth > kBlockDepth;
  const int64_t size = p.rows * p.cols;
  for (int64_t e = 0; e < p.depth; e += kBlockDepth) {
    const int64_t depth = min_(kBlockDepth, p.depth - e);
    const P* a = p.a + e / kBlockDepth * p.a_step;
    int64_t lda = p.lda;
    if constexpr (kPaired<P>) {
      if (parts && p.part) {
        lda = kPartStride;
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

// sums[i] = <x, row i of w [count, depth]>; inlined into what uses the sums the loop is slower.
template <class P>
__attribute__((noinline)) void dot_rows(const P* x, const P* w, int64_t depth, int64_t count, acc_t<P>* sums) {
  using A = acc_t<P>;
  for (int64_t i = 0; i < count; i += 4) {  // sums that do not wait for one another
    const int64_t last = count - 1 - i;
    const P *w0 = w + i * depth, *w1 = w0 + min_<int64_t>(1, last) * depth, *w2 = w0 + min_<int64_t>(2, last) * depth,
            *w3 = w0 + min_<int64_t>(3, last) * depth;
    A sum[4] = {};
    for (int64_t e = 0; e < depth; e += kBlockDepth) {
      const int64_t end = min_(e + kBlockDepth, depth);
      A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
      for (int64_t c = e; c < end; ++c) {
        const A v = to_acc(x[c]);
        s0 += v * to_acc(w0[c]), s1 += v * to_acc(w1[c]), s2 += v * to_acc(w2[c]), s3 += v * to_acc(w3[c]);
      }
      sum[0] += s0, sum[1] += s1, sum[2] += s2, sum[3] += s3;
    }
    for (int64_t j = 0; j < min_<int64_t>(4, count - i); ++j) sums[i + j] = sum[j];
  }
}

}  // namespace
}  // namespace vlmk::VLMK_ISA
