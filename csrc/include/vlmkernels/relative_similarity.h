#pragma once
#include "vlmkernels/isa.h"
#include "vlmkernels/types.h"

namespace vlmk {

// Rows that are 0 but at k indices, which ascend from 0 on.
template <class T>
struct SparseRows {
  const T* values;         // [rows][k]
  const int64_t* indices;  // [rows][k]
  int64_t k;
};

constexpr int64_t kTableRows = 16;

// Up to kTableRows rows of one side, their values at an index side by side: each entry of the other side's rows meets all of
// them at once.
template <class T>
struct SparseTable {
  SparseRows<T> rows;  // those of the table
  int64_t count;
  int64_t columns;   // above every index of these rows
  int32_t* place;    // [columns + 1]: which values belong to an index, 0 where no row has it
  acc_t<T>* values;  // [count k + 1][kTableRows], the first all 0
};

VLMK_PER_ISA(
    // Whether each row ascends, from 0 on.
    bool ascending(const int64_t* indices, int64_t rows, int64_t k);
    // out[r * of_table + i * of_row] = <row r of the table, row i> for the `count` rows of the other side. `place` is 0
    // before and after.
    template <class T> void relative_similarity(const SparseTable<T>&, const SparseRows<T>&, int64_t count, acc_t<T>* out,
                                                int64_t of_table, int64_t of_row);
    // out[i * m + j] = <row i of a, row j of b> by walking along both: for few products, and indices of any size.
    template <class T>
    void relative_similarity_merged(const SparseRows<T>& a, int64_t n, const SparseRows<T>& b, int64_t m, acc_t<T>* out);)

}  // namespace vlmk
