#pragma once
#include "vlmkernels/isa.h"
#include "vlmkernels/types.h"

namespace vlmk {

enum class Distance { l1, l2, cosine, smooth_l1 };

// With u and v the rows of student and teacher, divided by max(norm, 1e-12) where they are normalised:
// l = w sum_d f(u - v), f(x) = |x|, x^2, or x^2 / 2 for |x| < 1 and |x| - 1/2 beyond; cosine: l = w (1 - <u, v>).
// Rows of weight 0 are not read.
template <class T>
struct EmbeddingDistillation {
  const T *student, *teacher;  // [rows][d]
  const acc_t<T>* weight;      // [rows] or null
  int64_t d;
  Distance distance;
  bool normalize;  // true for cosine
};

VLMK_PER_ISA(
    // Weighted losses of rows [first, last) and, unless null, dstudent: factor times their derivatives.
    template <class T> void embedding_distillation(const EmbeddingDistillation<T>&, int64_t first, int64_t last,
                                                   acc_t<T>* loss,               // [rows]
                                                   double factor, T* dstudent);  // [rows][d]
    // dstudent of rows [first, last), from the gradients factor dloss of their weighted losses.
    template <class T> void embedding_distillation_bwd(const EmbeddingDistillation<T>&, int64_t first, int64_t last,
                                                       const acc_t<T>* dloss,                   // [rows], or one for all
                                                       bool one, double factor, T* dstudent);)  // [rows][d]

}  // namespace vlmk
