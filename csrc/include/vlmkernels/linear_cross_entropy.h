#pragma once
#include "vlmkernels/isa.h"
#include "vlmkernels/pairwise.h"

namespace vlmk {

// z_ij = (<h_i, w_j> + bias_j) scale_j; r_i = logsumexp_j z_ij; l_i = r_i - (1 - e) z_i,t_i - e / V sum_j z_ij;
// g_ij = u_i scale_j (exp(z_ij - r_i) - (1 - e) [j = t_i] - e / V).
//
// Tiles have classes j along their rows and rows i of h along their columns, so that the weight is an operand of two of the
// three products as it lies in memory, and sums over classes are vertical. In `pairs` the "queries" are the V classes and the
// "keys" the N rows of h.
template <class P>
struct LinearCrossEntropy {
  Pairs<P> pairs;
  const int64_t* target;              // [N] in [0, V)
  const acc_t<P>*bias, *class_scale;  // [V] or null
  const acc_t<P>* row_coef;           // [N] u
  acc_t<P> smoothing;                 // e
  bool need_hidden, need_weight, need_bias;
  bool formed;            // whether the tiles hold gradients of another loss
  int64_t chunk_classes;  // in blocks: the part of the classes whose sums one call forms
  // Of the classes of one chunk, [class chunks][N]: the maximum of z, the sum of exp(z - maximum), the sum of z if e > 0.
  acc_t<P>*max, *sum, *total;
  acc_t<P>*target_logit, *row_max, *row_log;  // [N]; r = max + log
  acc_t<P>* loss;                             // [N]
  acc_t<P>* tiles;  // z, then g, of the blocks [first, last) of rows of h; null when only the loss is asked for
  int64_t first, last;
  acc_t<P>* weight_sums;  // [V][depth], or null: then all rows are worked on at once
  double* bias_sums;      // [V]
  P *dhidden, *dweight;   // [N, D], [V, D]

  // kKeyTiles blocks of classes make a group, whose tiles of one block of rows lie side by side.
  static constexpr int64_t group = kKeyTiles<P>;
  int64_t groups() const { return ceil_div(pairs.row_blocks(), group); }
  acc_t<P>* logits(int64_t ib, int64_t jb) const {
    return tiles + ((ib / group * (last - first) + jb - first) * group + ib % group) * kTileSize;
  }
  // [group * kTileRows][kTileCols]; for operands of paired rows, [group * kTileRows / 2][kTileCols][2] comes next.
  P* gradients(int64_t classes, int64_t jb) const { return reinterpret_cast<P*>(logits(classes * group, jb)); }
};

VLMK_PER_ISA(
    // z and the sums over one chunk of classes, of block jb of rows. scratch: kTileSize, unless there are tiles.
    template <class P>
    void linear_cross_entropy_logits(const LinearCrossEntropy<P>&, int64_t class_chunk, int64_t jb, acc_t<P>* scratch);
    // Losses and r of block jb of rows from the sums of all chunks.
    template <class P> void linear_cross_entropy_rows(const LinearCrossEntropy<P>&, int64_t jb);
    // Turns the tiles of a group of classes into gradients and adds their products to those of the weight and the bias.
    // operand: group tiles; sums: group * kTileRows * depth, unless there are weight_sums.
    template <class P>
    void linear_cross_entropy_classes(const LinearCrossEntropy<P>&, int64_t classes, P* operand, acc_t<P>* sums);
    // Columns [d0, d1) of dh of blocks [jb0, jb1) of rows. sums: (jb1 - jb0 + 1) * (d1 - d0) * kTileCols; operand: (d1 - d0) *
    // group * kTileRows.
    template <class P> void linear_cross_entropy_hidden(const LinearCrossEntropy<P>&, int64_t jb0, int64_t jb1, int64_t d0,
                                                        int64_t d1, acc_t<P>* sums, P* operand);)

}  // namespace vlmk
