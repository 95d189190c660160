#include "vlmkernels/mine_hard_negatives.h"

#include "retrieval.h"

namespace vlmk::VLMK_ISA {
namespace {

template <class A>
bool is_candidate(const Candidates<A>& g, int64_t i, int64_t j) {
  if (g.labels.query[i] == g.labels.key[j]) return false;
  return !g.groups.query || g.groups.query[i] != g.groups.key[j];
}

// Scores that are NaN are within no limit.
template <class A>
bool is_within(const Candidates<A>& g, int64_t i, A score) {
  return !g.limit || !g.has_limit[i] || score <= g.limit[i];
}

}  // namespace

template <class A>
void mine_hard_negatives_offer(const Candidates<A>& g, const Best<A>& best, int64_t first, int64_t i0, int64_t cols, int64_t j0,
                               int64_t rows, const A* tile, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) {
    const A* row = tile + r * ld;
    for_better<1>(row, best.least + first, cols, [&](int64_t c) {
      if (is_within(g, i0 + c, row[c]) && is_candidate(g, i0 + c, j0 + r)) keep(best, first + c, row[c], j0 + r);
    });
  }
}

template <class A>
void mine_hard_negatives_finish(const Candidates<A>& g, const Best<A>* lists, int64_t count, int64_t row, int64_t i, int64_t m,
                                int64_t k, Found<A>* scratch, int64_t* indices) {
  const int64_t most = min_(k, m), held = gathered(lists, count, row, most, scratch);
  const A nan = static_cast<A>(__builtin_nan(""));
  const auto allowed = [&](int64_t j) { return is_within(g, i, nan) && is_candidate(g, i, j); };
  const int64_t all = append_nan(scratch, held, most, m, allowed);
  std::sort(scratch, scratch + held, Better());
  for (int64_t j = 0; j < k; ++j) indices[j] = j < all ? scratch[j].index : -1;
}

#define VLMK_INSTANTIATE(A)                                                                                                   \
  template void mine_hard_negatives_offer(const Candidates<A>&, const Best<A>&, int64_t, int64_t, int64_t, int64_t, int64_t,  \
                                          const A*, int64_t);                                                                 \
  template void mine_hard_negatives_finish(const Candidates<A>&, const Best<A>*, int64_t, int64_t, int64_t, int64_t, int64_t, \
                                           Found<A>*, int64_t*);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)

}  // namespace vlmk::VLMK_ISA
