// vlmkernels::topk_similarity for CPU tensors (contract: vlmkernels/ops/topk_similarity.py).
#include "vlmkernels/topk_similarity.h"

#include <torch/library.h>

#include "retrieval.h"

namespace vlmk {
namespace {

using at::Tensor;
using std::optional;

// The results of rows [0, rows) of the lists, the first of them row `first` of the results.
template <class A>
void finish(const Lists<A>& lists, int64_t rows, int64_t first, int64_t end, bool by_value, const Tensor& values,
            const Tensor& indices) {
  const int64_t k = values.size(1), count = lists.slots.size();
  A* value = data<A>(values) + first * k;
  int64_t* index = data<int64_t>(indices) + first * k;
  for_rows(lists, rows, [&](int64_t row, Found<A>* memory) {
    VLMK_CALL(topk_finish, lists.slots.data(), count, row, k, end, by_value, memory, value + row * k, index + row * k);
  });
}

auto topk_similarity(const Tensor& query_, const Tensor& key_, const optional<Tensor>& key_scale, int64_t k, bool normalize,
                     bool return_sorted, bool both) {
  const Need need("topk_similarity");
  need_keys(need, query_, key_, key_scale);
  need.that(k >= 1 && k < int64_t(1) << 31, "k must be in [1, 2**31), got ", k);
  const int64_t n = query_.size(0), m = key_.size(0), of_queries = std::min(k, m), of_keys = std::min(k, n);
  need.countable({n, of_queries});
  need.countable({m, of_keys});
  const Tensor query = with_width(query_), key = with_width(key_);
  const auto options = query.options().dtype(similarity_type(query, key));
  const Tensor values = at::empty({n, of_queries}, options), indices = at::empty({n, of_queries}, at::kLong);
  const Tensor key_values = both ? at::empty({m, of_keys}, options) : at::empty({0}, options);
  const Tensor key_indices = both ? at::empty({m, of_keys}, at::kLong) : at::empty({0}, at::kLong);
  const auto results = std::tuple(values, indices, key_values, key_indices);
  if (n == 0 || m == 0) return results;
  const bool few = n <= kFewSearches && !both;
  with_keys(query, key, [&](auto operand, auto stored) {
    using P = decltype(operand);
    using A = acc_t<P>;
    const Search<P, decltype(stored)> search(query, key, key_scale, normalize, few);
    const auto& g = search.g;
    const int64_t slots = search.slots(few), room = room_of(of_queries, 64, m);
    if constexpr (std::is_same_v<P, A>) {
      if (few) {
        const Lists<A> lists(slots, n, of_queries, room);
        search.for_few([&](int64_t slot, int64_t j0, int64_t count, const A* scores) {
          VLMK_CALL(topk_rows, lists.slots[slot], 0, scores, kFewKeys, n, count, j0);
        });
        return finish(lists, n, 0, m, return_sorted, values, indices);
      }
    }
    const int64_t blocks = blocks_at_once(g.blocks(), g.width, room * sizeof(Found<A>));
    Lists<A> lists(slots, blocks * g.width, of_queries, room);
    const Lists<A> columns(1, both ? m : 0, of_keys, room_of(of_keys, 16, n));
    for (int64_t first = 0; first < g.blocks(); first += blocks) {
      const int64_t last = std::min(first + blocks, g.blocks());
      if (first > 0) lists.clear();
      search.for_tiles([&](int64_t slot, int64_t j0, int64_t rows, auto products) {
        for (int64_t block = first; block < last; ++block) {
          const int64_t i0 = block * g.width, cols = std::min(g.width, n - i0), list = (block - first) * g.width;
          const A* tile = products(block);
          VLMK_CALL(topk_columns, lists.slots[slot], list, tile, g.width, rows, cols, j0);
          if (both) VLMK_CALL(topk_rows, columns.slots[0], j0, tile, g.width, rows, cols, i0);
        }
      });
      const int64_t i0 = first * g.width;
      finish(lists, std::min(last * g.width, n) - i0, i0, m, return_sorted, values, indices);
    }
    if (both) finish(columns, m, 0, n, return_sorted, key_values, key_indices);
  });
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) { m.impl("topk_similarity", &topk_similarity); }

}  // namespace vlmk
