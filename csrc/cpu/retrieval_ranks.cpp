#include "vlmkernels/retrieval_ranks.h"

#include "simd.h"

namespace vlmk::VLMK_ISA {

template <class A>
void retrieval_ranks_count(const Labels& labels, bool any, int64_t i0, int64_t cols, int64_t j0, int64_t rows, const A* tile,
                           int64_t ld, const A* query_best, const A* key_best, int64_t* query_counts, int64_t* key_counts) {
  const A* best = query_best + i0;
  int32_t counts[kTileCols];
  for (int64_t c = 0; c < cols; ++c) counts[c] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const A *row = tile + r * ld, own = key_best[j0 + r];
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t c = 0; c < cols; ++c) {
      counts[c] += !(row[c] < best[c]);
      count += !(row[c] < own);
    }
    for (int64_t c = 0; any && c < cols; ++c) {
      if (labels.query[i0 + c] != labels.key[j0 + r]) continue;
      counts[c] -= !(row[c] < best[c]);
      count -= !(row[c] < own);
    }
    key_counts[j0 + r] += count;
  }
  for (int64_t c = 0; c < cols; ++c) query_counts[i0 + c] += counts[c];
}

template void retrieval_ranks_count(const Labels&, bool, int64_t, int64_t, int64_t, int64_t, const float*, int64_t,
                                    const float*, const float*, int64_t*, int64_t*);
template void retrieval_ranks_count(const Labels&, bool, int64_t, int64_t, int64_t, int64_t, const double*, int64_t,
                                    const double*, const double*, int64_t*, int64_t*);

}  // namespace vlmk::VLMK_ISA
