#pragma once
#include "vlmkernels/retrieval.h"

namespace vlmk {

// A key is no candidate of a query that it matches, or whose group it is of; nor, with a margin, if it is more similar than the
// query's best match less the margin.
template <class A>
struct Candidates {
  Labels labels, groups;     // the groups may be null
  const A* limit;            // [n] or null
  const uint8_t* has_limit;  // [n]
};

VLMK_PER_ISA(
    // Offers the candidates of a tile [rows][ld] to the lists first, first + 1, ... of its queries [i0, i0 + cols); the keys of
    // a list come in rising order.
    template <class A> void mine_hard_negatives_offer(const Candidates<A>&, const Best<A>&, int64_t first, int64_t i0,
                                                      int64_t cols, int64_t j0, int64_t rows, const A* tile, int64_t ld);
    // The k best of list `row` of all `lists`, of query i among m keys: by falling similarity, then -1. scratch: count * room.
    template <class A> void mine_hard_negatives_finish(const Candidates<A>&, const Best<A>* lists, int64_t count, int64_t row,
                                                       int64_t i, int64_t m, int64_t k, Found<A>* scratch, int64_t* indices);)

}  // namespace vlmk
