#pragma once
#include "vlmkernels/isa.h"
#include "vlmkernels/pairwise.h"

namespace vlmk {

// Losses of a problem small enough to store its similarity matrix: x_ij = a_i b_j <q_i, k_j>, S_ij = scale x_ij + bias,
// pairs (i, i) positive. One call computes kSmallRows rows; columns are processed in vectors of kSmallCols.
constexpr int64_t kSmallRows = 32, kSmallCols = 64;

// G = dL/dS, with L the loss before the incoming gradient. The gradients are products of G with the features; positives are
// kept out of the products and added in the precision of the sums.
template <class P>
struct PairwiseSmall {
  Pairs<P> pairs;    // kt: [col blocks][depth][kSmallCols], bf16 [col blocks][depth / 2][kSmallCols][2]; k and qt unused
  int64_t ldx, ldt;  // m and n, rounded up to multiples of kSmallCols
  acc_t<P> bias;
  bool columns;                               // softmaxes along the columns too; the cross-entropy then needs n = m
  acc_t<P> smoothing;                         // of the cross-entropy
  acc_t<P>* x;                                // [n, ldx]; -x under softmaxes at a negative scale
  acc_t<P>* diagonal;                         // [n] x_ii
  acc_t<P>*row_max, *row_log;                 // [n] lse = |scale| max + log, max being that of x, or -x at a negative scale
  acc_t<P>*col_max, *col_log;                 // [m]
  acc_t<P>*row_sum, *col_sum;                 // [n], [m] e^log
  acc_t<P>*part_max, *part_sum, *part_total;  // [row blocks, m] of a block's rows: maximum, sum of exponentials, sum
  double *loss, *dscale, *dbias;              // [n] of each row: its loss, and its sums of G x and G
  P* slope;                                   // [n, ldx] G_ij b_j off the positives, 0 from m on; or null
  P* slope_t;                                 // [m, ldt] G_ij a_i off the positives, transposed, 0 from n on; or null
  acc_t<P>* positive;                         // [n] G_ii; or null: the slopes have all pairs
  bool need_slopes;                           // any of the gradients

  int64_t row_blocks() const { return ceil_div(pairs.n, kSmallRows); }
};

// Softmaxes s of the student's pairs, p of the teacher's, s' and p' along the columns:
//   L = sum_ij row_weight p_ij (log p_ij - log s_ij) + col_weight p'_ij (log p'_ij - log s'_ij), or without log p and log p'
template <class P>
struct SmallDistillation {
  PairwiseSmall<P> student, teacher;  // the teacher's x and log-sum-exps alone
  bool cross_entropy;                 // without log p
  acc_t<P> row_weight, col_weight;
};

// dx_i = factor inv_i (D_i - inv_i^2 <x_i, D_i> x_i) with D_i = sum_j slope_ij y_j + positive_i inv'_i y_i; the factors inv and
// the second term only when normalised.
template <class P>
struct DenseGradient {
  int64_t rows, others, d;
  int64_t width;   // row stride of the operand and the sums: d, or (bf16) the depth
  int64_t depth;   // rows of the operand: others, or (bf16) rounded up to a multiple of kSmallCols
  const P* slope;  // [rows, lds]
  int64_t lds;
  const P* operand;            // y as [depth, width]; bf16 [depth / 2][width][2]
  const acc_t<P>* positive;    // [min(rows, others)] or null
  const P *x, *y;              // [rows, d], [others, d]
  const acc_t<P>*inv, *inv_y;  // [rows], [others] or null
  acc_t<P> factor;
  P* dx;  // [rows, d]
  TileProduct<P> product;
};

VLMK_PER_ISA(
    // Similarities of row block ib, log-sum-exps of its rows, and its part of the columns' sums.
    template <class P> void small_log_sum_exps_rows(const PairwiseSmall<P>&, int64_t ib);
    // The log-sum-exps of the columns, after all rows.
    template <class P> void small_log_sum_exps_columns(const PairwiseSmall<P>&);
    // Cross-entropy: the log-sum-exps with the losses of the rows, then with the sum of the columns' losses, which is returned.
    template <class P> void small_cross_entropy_rows(const PairwiseSmall<P>&, int64_t ib);
    template <class P> double small_cross_entropy_columns(const PairwiseSmall<P>&);
    // The slopes of row block ib. scratch: kSmallRows * ldx.
    template <class P> void small_cross_entropy_slopes(const PairwiseSmall<P>&, int64_t ib, acc_t<P>* scratch);
    // The loss of row block ib and its slopes, after the log-sum-exps of student and teacher. scratch: (kSmallRows + 2) ldx.
    template <class P> void small_distillation(const SmallDistillation<P>&, int64_t ib, acc_t<P>* scratch);
    // The logistic loss of row block ib and its slopes. scratch: kSmallRows * ldx.
    template <class P> void small_logistic(const PairwiseSmall<P>&, int64_t ib, acc_t<P>* scratch);
    // Rows of the gradient from block ib. scratch: kSmallRows * width.
    template <class P> void dense_gradient(const DenseGradient<P>&, int64_t ib, acc_t<P>* scratch);)

}  // namespace vlmk
