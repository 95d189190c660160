// vlmkernels::retrieval_ranks for CPU tensors (contract: vlmkernels/ops/retrieval_ranks.py).
#include "vlmkernels/retrieval_ranks.h"

#include <torch/library.h>

#include "retrieval.h"

namespace vlmk {
namespace {

using at::Tensor;
using std::optional;

auto retrieval_ranks(const Tensor& query_, const Tensor& key_, const optional<Tensor>& positives,
                     const optional<Tensor>& key_ids) {
  const Need need("retrieval_ranks");
  need_keys(need, query_, key_, {});
  const Tensor query = with_width(query_), key = with_width(key_);
  const Matches matches("retrieval_ranks", need, query, key, positives, key_ids);
  const int64_t n = query.size(0), m = key.size(0);
  const Tensor query_ranks = at::full({n}, m + 1, at::kLong), key_ranks = at::full({m}, n + 1, at::kLong);
  const auto results = std::tuple(query_ranks, key_ranks);
  if (n == 0 || m == 0) return results;
  with_keys(query, key, [&](auto operand, auto stored) {
    using P = decltype(operand);
    using A = acc_t<P>;
    const Search<P, decltype(stored)> search(query, key, {}, false, false);
    const auto& g = search.g;
    const BestMatches<P, decltype(stored)> best(search, matches.labels, true);
    const int64_t slots = search.slots(false);
    const Tensor query_counts = at::zeros({slots, n}, at::kLong), key_counts = at::zeros({m}, at::kLong);
    search.for_tiles([&](int64_t slot, int64_t j0, int64_t rows, auto products) {
      int64_t* counts = data<int64_t>(query_counts) + slot * n;
      for (int64_t block = 0; block < g.blocks(); ++block) {
        const int64_t i0 = block * g.width, cols = std::min(g.width, n - i0);
        const A* tile = products(block);
        const bool any = VLMK_CALL(retrieval_any_match, matches.labels, i0, cols, j0, rows);
        VLMK_CALL(retrieval_ranks_count, matches.labels, any, i0, cols, j0, rows, tile, g.width, best.queries.score,
                  best.keys.score, counts, data<int64_t>(key_counts));
      }
    });
    const Tensor counts = query_counts.sum(0);
    for (int64_t i = 0; i < n; ++i) {
      if (best.queries.any[i]) data<int64_t>(query_ranks)[i] = 1 + data<int64_t>(counts)[i];
    }
    for (int64_t j = 0; j < m; ++j) {
      if (best.keys.any[j]) data<int64_t>(key_ranks)[j] = 1 + data<int64_t>(key_counts)[j];
    }
  });
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) { m.impl("retrieval_ranks", &retrieval_ranks); }

}  // namespace vlmk
