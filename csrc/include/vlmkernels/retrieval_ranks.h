#pragma once
#include "vlmkernels/retrieval.h"

namespace vlmk {

VLMK_PER_ISA(
    // Adds to the counts of queries [i0, i0 + cols) how many of the keys [j0, j0 + rows) that do not match are not below the
    // query's best match, by the similarities of a tile [rows][ld], and to those of the keys likewise. `any`: whether some
    // match.
    template <class A> void retrieval_ranks_count(const Labels&, bool any, int64_t i0, int64_t cols, int64_t j0, int64_t rows,
                                                  const A* tile, int64_t ld, const A* query_best, const A* key_best,
                                                  int64_t* query_counts, int64_t* key_counts);)

}  // namespace vlmk
