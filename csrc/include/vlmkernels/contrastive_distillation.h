#pragma once
#include "vlmkernels/isa.h"
#include "vlmkernels/pairwise.h"

namespace vlmk {

// S_ij = scale <q_i, k_j> of the student, T_ij of the teacher; s and p their softmaxes along a row, or along a column.

// Of the logits of rows, or of columns: the maxima S* and T*, and the sums of
//   e^(S - S*)    e^(S - S*) (S - S*)    e^(T - T*)    e^(T - T*) (S - S*)    e^(T - T*) ((T - T*) - (S - S*)).
// The sums are double, since the gradient of the scale is a difference of two of them.
template <class A>
struct LogitSums {
  A *student_max, *teacher_max;
  double *student, *moment, *teacher, *cross, *gap;
  LogitSums at(int64_t i) const {
    return {student_max + i, teacher_max + i, student + i, moment + i, teacher + i, cross + i, gap + i};
  }
};
template <class A>
LogitSums<A> logit_sums(A* maxima, double* sums, int64_t count) {  // [2][count], [5][count]
  return {maxima, maxima + count, sums, sums + count, sums + 2 * count, sums + 3 * count, sums + 4 * count};
}

// Of rows, or of columns: log-sum-exps in two parts, the maximum and the rest.
template <class A>
struct LogSumExps {
  const A *student_max, *student_log, *teacher_max, *teacher_log;
};

template <class P>
struct ContrastiveDistillationStats {
  Pairs<P> student, teacher;
  bool columns;
  int64_t chunk_rows, chunk_cols;  // in blocks: the part of S and T that one call sees
  LogitSums<acc_t<P>> rows;        // [col chunks][n]
  LogitSums<acc_t<P>> cols;        // [row chunks][m], when columns
  acc_t<P>* store;                 // [stored_tiles][2][kTileRows][kTileCols] S and T, in the order of row-major tile indices
  int64_t stored_tiles;
};

// g_ij = u_i (s_ij - p_ij) + v_j (s'_ij - p'_ij), s' and p' being the softmaxes along the columns.
template <class P>
struct ContrastiveDistillationGrads {
  Pairs<P> student, teacher;
  LogSumExps<acc_t<P>> rows, cols;     // [n], [m]
  const acc_t<P>*row_coef, *col_coef;  // [n] u, [m] v, or null: rows only
  const acc_t<P>* store;
  int64_t stored_tiles;
  P* tiles;  // g of row blocks [first, last): [row blocks][col blocks][kTileRows][kTileCols]
  int64_t first, last;
  acc_t<P>* key_sums;  // [col blocks][d][kTileCols]
  Finish<P> query, key;

  P* tile(int64_t ib, int64_t jb) const { return tiles + ((ib - first) * student.col_blocks() + jb) * kTileSize; }
};

VLMK_PER_ISA(
    // Sums over the rows and columns of one chunk of S and T. scratch: 2 * kTileSize, for tiles that are not stored.
    template <class P> void contrastive_distillation_stats(const ContrastiveDistillationStats<P>&, int64_t row_chunk,
                                                           int64_t col_chunk, acc_t<P>* scratch);
    // Joins the sums [parts][count] of the chunks in [begin, end). loss [count]: sum p (log p - log s), or -sum p log s;
    // out [5][count]: S*, log sum e^(S - S*), T*, log sum e^(T - T*), sum (s - p) S.
    template <class A> void contrastive_distillation_merge(LogitSums<A> parts, int64_t part_count, int64_t count, int64_t begin,
                                                           int64_t end, bool cross_entropy, A* loss, A* out);
    // Writes the tile (ib, jb) of g. scratch: 2 * kTileSize.
    template <class P>
    void contrastive_distillation_tile(const ContrastiveDistillationGrads<P>&, int64_t ib, int64_t jb, acc_t<P>* scratch);
    // dq of row block ib. sums: kTileRows * depth.
    template <class P> void contrastive_distillation_query(const ContrastiveDistillationGrads<P>&, int64_t ib, acc_t<P>* sums);
    // Adds the row blocks [first, last) to columns [d0, d1) of block jb's key_sums. operand: kKeyTiles tiles.
    template <class P> void contrastive_distillation_key(const ContrastiveDistillationGrads<P>&, int64_t jb, int64_t d0,
                                                         int64_t d1, bool accumulate, P* operand);
    // dk of column block jb from its key_sums. rows: kTileCols * d.
    template <class P>
    void contrastive_distillation_finish_key(const ContrastiveDistillationGrads<P>&, int64_t jb, acc_t<P>* rows);)

}  // namespace vlmk
