#pragma once
#include "vlmkernels/pairwise.h"

namespace vlmk {

// A product runs over blocks of kBlockRows rows and kBlockCols columns, as measured best, in parts of kPart of its depth: one
// long chain of additions would round more than mm does, and a part of a block of rows stays in the cache.
constexpr int64_t kPart = 256;
template <class P>
constexpr int64_t kBlockRows = sizeof(P) == 2 ? 256 : 512;
template <class P>
constexpr int64_t kBlockCols = sizeof(P) == 2 ? 256 : 64;

// Rows of A against several column blocks of B. A B operand is [blocks][depth][cols], bf16 [blocks][depth / 2][cols][2]; or,
// when ldb is not cols, columns of one matrix [depth][ldb].
template <class P>
struct BlockProduct {
  TileProduct<P> product;
  const P* a;  // [rows, depth]; its parts are a_step apart and their rows lda
  const P* b;
  int64_t rows, depth, cols, lda, a_step, ldb;
  int64_t first, last;  // column blocks
  acc_t<P>* tiles;      // [last - first][rows][cols]
  P* part;              // [rows][kPart + 32], bf16 only
};

VLMK_PER_ISA(
    // out[i] = row index[i] (i when null) of x as P, with zeros up to depth and in rows beyond count.
    template <class S, class P>
    void load_rows(const S* x, const int64_t* index, int64_t count, int64_t d, int64_t rows, int64_t depth, P* out);
    // Columns [0, count) of w [d, ldw], row i times t[i] (1 when null), as one block of a B operand, zero padded.
    template <class P>
    void pack_columns_b(const P* w, int64_t ldw, const acc_t<P>* t, int64_t count, int64_t d, int64_t depth, P* out);)

}  // namespace vlmk
