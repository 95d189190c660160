#pragma once
#include "vlmkernels/retrieval.h"

namespace vlmk {

VLMK_PER_ISA(
    // Offers scores [rows][ld] to the lists first, first + 1, ... of their columns; row r has the index `index` + r. A list is
    // offered rising indices: of equal values the first is the better one.
    template <class A>
    void topk_columns(const Best<A>&, int64_t first, const A* scores, int64_t ld, int64_t rows, int64_t cols, int64_t index);
    // The same to the lists of their rows: column c has the index `index` + c.
    template <class A>
    void topk_rows(const Best<A>&, int64_t first, const A* scores, int64_t ld, int64_t rows, int64_t cols, int64_t index);
    // The k best of list `row` of all `lists`, by falling value or by rising index. Where fewer were found, the indices in
    // [0, end) that are in none are those of NaN. scratch: count * room.
    template <class A> void topk_finish(const Best<A>* lists, int64_t count, int64_t row, int64_t k, int64_t end, bool by_value,
                                        Found<A>* scratch, A* values, int64_t* indices);)

}  // namespace vlmk
