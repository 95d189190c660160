#pragma once
#include "vlmkernels/isa.h"
#include "vlmkernels/pairwise.h"

namespace vlmk {

// z_ij = scale a_i b_j <q_i, k_j> + bias; t_ij = +1 on positives, -1 elsewhere; g_ij = -u_i t_ij sigmoid(-t_ij z_ij).
template <class P>
struct SigmoidLoss {
  Pairs<P> pairs;
  acc_t<P> bias;
  const int64_t* positives;            // [n], -1: none; or null when ids are given
  const int64_t *query_ids, *key_ids;  // [n], [m], or null
  const acc_t<P>* row_coef;            // [n] u
  bool need_loss, need_grad;
  int64_t chunk_cols;              // in blocks: the part of a row block that one call sees
  acc_t<P>*loss, *dbias, *dscale;  // [col chunks][n] sums over the chunk's columns of softplus(-t z), g, g a_i b_j <q_i, k_j>
  P* tiles;                        // g of row blocks [first, last): [row blocks][col blocks][kTileRows][kTileCols]
  int64_t first, last;
  acc_t<P>* key_sums;  // [col blocks][d][kTileCols]
  Finish<P> query, key;
};

VLMK_PER_ISA(
    // Losses and gradient tiles of row block ib in one chunk of columns. scratch: kTileSize.
    template <class P> void sigmoid_loss_tiles(const SigmoidLoss<P>&, int64_t ib, int64_t col_chunk, acc_t<P>* scratch);
    // dq of row block ib. sums: kTileRows * depth; operand: kTileSize.
    template <class P> void sigmoid_loss_query(const SigmoidLoss<P>&, int64_t ib, acc_t<P>* sums, P* operand);
    // Adds the row blocks [first, last) to columns [d0, d1) of block jb's key_sums. operand: kKeyTiles tiles.
    template <class P>
    void sigmoid_loss_key(const SigmoidLoss<P>&, int64_t jb, int64_t d0, int64_t d1, bool accumulate, P* operand);
    // dk of column block jb from its key_sums. rows: kTileCols * d.
    template <class P> void sigmoid_loss_finish_key(const SigmoidLoss<P>&, int64_t jb, acc_t<P>* rows);)

}  // namespace vlmk
