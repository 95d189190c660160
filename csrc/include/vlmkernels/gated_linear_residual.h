#pragma once
#include "vlmkernels/dense.h"

namespace vlmk {

// out = x + t (h weight^T) with t = tanh(gate) is a form of LinearOutput. Operands have type P, h, weight and their gradients
// type T.

// dh = t (dout weight) and <dout weight, h>. For a gate of d elements they are part of `weight`, and t is 1.
template <class P, class T>
struct GatedLinearInput {
  int64_t k;
  const int64_t* index;  // which rows of h and dh the rows of dout are; null when they are all
  acc_t<P> t;
  const T* h;    // [rows, k], or null if the dots are not needed
  T* dh;         // [rows, k]
  double* dots;  // [row blocks][column blocks], or null
};

// products = dout^T h and what they give: dweight = t products, part = sum_k products * weight.
template <class P, class T>
struct GatedLinearWeight {
  int64_t d, k;
  const acc_t<P>* t;   // [d]
  const T* weight;     // [d, k], or null if part is not needed
  acc_t<P>* products;  // [d, k] sums over earlier rows, if the rows take more than one task
  T* dweight;          // [d, k], or null
  acc_t<P>* part;      // [column blocks][d]
};

VLMK_PER_ISA(
    // B is the weight. The product's rows are kept rows [row, row + count).
    template <class P, class T>
    void gated_linear_residual_dh(const BlockProduct<P>& p, const GatedLinearInput<P, T>& g, int64_t row, int64_t count);
    // A is dout^T of `count` channels from d0 on, B is h, both of some kept rows: their products are added to those of earlier
    // rows when `add`, and give dweight and part when `finish`.
    template <class P, class T> void gated_linear_residual_dw(const BlockProduct<P>& p, const GatedLinearWeight<P, T>& g,
                                                              int64_t d0, int64_t count, bool add, bool finish);)

}  // namespace vlmk
