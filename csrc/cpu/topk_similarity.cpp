#include "vlmkernels/topk_similarity.h"

#include "retrieval.h"

namespace vlmk::VLMK_ISA {

template <class A>
void topk_columns(const Best<A>& best, int64_t first, const A* scores, int64_t ld, int64_t rows, int64_t cols, int64_t index) {
  for (int64_t r = 0; r < rows; ++r) {
    const A* row = scores + r * ld;
    for_better<1>(row, best.least + first, cols, [&](int64_t c) { keep(best, first + c, row[c], index + r); });
  }
}

template <class A>
void topk_rows(const Best<A>& best, int64_t first, const A* scores, int64_t ld, int64_t rows, int64_t cols, int64_t index) {
  for (int64_t r = 0; r < rows; ++r) {
    const A* row = scores + r * ld;
    for_better<0>(row, best.least + first + r, cols, [&](int64_t c) { keep(best, first + r, row[c], index + c); });
  }
}

template <class A>
void topk_finish(const Best<A>* lists, int64_t count, int64_t row, int64_t k, int64_t end, bool by_value, Found<A>* scratch,
                 A* values, int64_t* indices) {
  const int64_t held = gathered(lists, count, row, k, scratch);
  const int64_t all = append_nan(scratch, held, k, end, [](int64_t) { return true; });
  if (by_value) {
    std::sort(scratch, scratch + held, Better());
  } else {
    std::sort(scratch, scratch + all, Earlier());
  }
  for (int64_t j = 0; j < all; ++j) values[j] = scratch[j].value, indices[j] = scratch[j].index;
}

#define VLMK_INSTANTIATE(A)                                                                          \
  template void topk_columns(const Best<A>&, int64_t, const A*, int64_t, int64_t, int64_t, int64_t); \
  template void topk_rows(const Best<A>&, int64_t, const A*, int64_t, int64_t, int64_t, int64_t);    \
  template void topk_finish(const Best<A>*, int64_t, int64_t, int64_t, int64_t, bool, Found<A>*, A*, int64_t*);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)

}  // namespace vlmk::VLMK_ISA
