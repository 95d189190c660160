#include "vlmkernels/gated_linear_residual.h"

#include "dense.h"

namespace vlmk::VLMK_ISA {

template <class P, class T>
void gated_linear_residual_dh(const BlockProduct<P>& p, const GatedLinearInput<P, T>& g, int64_t row, int64_t count) {
  using A = acc_t<P>;
  for_tiles(p, [&](int64_t j, const A* tile) {
    const int64_t k0 = j * p.cols, cols = min_(p.cols, g.k - k0);
    double sum = 0;
    for (int64_t r = row; r < row + count; ++r, tile += p.cols) {
      const int64_t at = (g.index ? g.index[r] : r) * g.k + k0;
      if (g.h) sum += dot(tile, g.h + at, cols);
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
      if (g.weight) g.part[j * g.d + d] = dot(tile, g.weight + at, cols);
      if (g.dweight) {
        T* dweight = g.dweight + at;
        const A t = g.t[d];
#pragma omp simd
        for (int64_t c = 0; c < cols; ++c) from_acc(t * tile[c], dweight[c]);
      }
    }
  });
}

#define VLMK_INSTANTIATE(P, T)                                                                                     \
  template void gated_linear_residual_dh(const BlockProduct<P>&, const GatedLinearInput<P, T>&, int64_t, int64_t); \
  template void gated_linear_residual_dw(const BlockProduct<P>&, const GatedLinearWeight<P, T>&, int64_t, int64_t, bool, bool);
VLMK_INSTANTIATE(double, double)
VLMK_INSTANTIATE(float, float)
VLMK_INSTANTIATE(float, bf16)
VLMK_INSTANTIATE(float, f16)
VLMK_INSTANTIATE(bf16, bf16)
VLMK_INSTANTIATE(bf16, float)

}  // namespace vlmk::VLMK_ISA
