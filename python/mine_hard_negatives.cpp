// vlmkernels::mine_hard_negatives for CPU tensors (contract: vlmkernels/ops/mine_hard_negatives.py).
#include "vlmkernels/mine_hard_negatives.h"

#include <torch/library.h>

#include "retrieval.h"

namespace vlmk {
namespace {

using at::Tensor;
using std::optional;

Tensor mine_hard_negatives(const Tensor& query_, const Tensor& key_, const optional<Tensor>& positives,
                           const optional<Tensor>& key_ids, const optional<Tensor>& query_groups,
                           const optional<Tensor>& key_groups, int64_t k, optional<double> margin, bool normalize) {
  const Need need("mine_hard_negatives");
  need_keys(need, query_, key_, {});
  const Tensor query = with_width(query_), key = with_width(key_);
  const Matches matches("mine_hard_negatives", need, query, key, positives, key_ids);
  const int64_t n = query.size(0), m = key.size(0), most = std::min(k, m);
  need.tensor("query_groups", query_groups, n, at::kLong);
  need.tensor("key_groups", key_groups, m, at::kLong);
  need.that(query_groups.has_value() == key_groups.has_value(), "groups must be of both the queries and the keys, or of none");
  need.that(k >= 1 && k < int64_t(1) << 31, "k must be in [1, 2**31), got ", k);
  need.countable({n, k});
  const Tensor indices = at::empty({n, k}, at::kLong);
  if (n == 0 || m == 0) return indices.fill_(-1);
  const Tensor own = contiguous(query_groups), others = contiguous(key_groups);
  with_keys(query, key, [&](auto operand, auto stored) {
    using P = decltype(operand);
    using A = acc_t<P>;
    const Search<P, decltype(stored)> search(query, key, {}, normalize, false);
    const auto& g = search.g;
    Candidates<A> candidates{matches.labels, {data<int64_t>(own), data<int64_t>(others)}, nullptr, nullptr};
    optional<BestMatches<P, decltype(stored)>> best;
    if (margin) {
      best.emplace(search, matches.labels, false);
      for (int64_t i = 0; i < n; ++i) best->queries.score[i] -= static_cast<A>(*margin);
      candidates.limit = best->queries.score, candidates.has_limit = best->queries.any;
    }
    const int64_t room = room_of(most, 64, m), blocks = blocks_at_once(g.blocks(), g.width, room * sizeof(Found<A>));
    Lists<A> lists(search.slots(false), blocks * g.width, most, room);
    for (int64_t first = 0; first < g.blocks(); first += blocks) {
      const int64_t last = std::min(first + blocks, g.blocks()), start = first * g.width;
      if (first > 0) lists.clear();
      search.for_tiles([&](int64_t slot, int64_t j0, int64_t rows, auto products) {
        for (int64_t block = first; block < last; ++block) {
          const int64_t i0 = block * g.width, cols = std::min(g.width, n - i0);
          const A* tile = products(block);
          VLMK_CALL(mine_hard_negatives_offer, candidates, lists.slots[slot], i0 - start, i0, cols, j0, rows, tile, g.width);
        }
      });
      const int64_t count = lists.slots.size();
      for_rows(lists, std::min(last * g.width, n) - start, [&](int64_t row, Found<A>* memory) {
        VLMK_CALL(mine_hard_negatives_finish, candidates, lists.slots.data(), count, row, start + row, m, k, memory,
                  data<int64_t>(indices) + (start + row) * k);
      });
    }
  });
  return indices;
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) { m.impl("mine_hard_negatives", &mine_hard_negatives); }

}  // namespace vlmk
