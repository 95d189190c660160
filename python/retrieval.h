#pragma once
// What the retrieval ops on a CPU share: checks, the walk over the keys, lists of the best.
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <type_traits>
#include <vector>

#include "bridge.h"
#include "vlmkernels/retrieval.h"

namespace vlmk {

// query [n, d], key [m, d]: float, of any two dtypes, or int8 with key_scale [m].
inline void need_keys(const Need& need, const at::Tensor& query, const at::Tensor& key,
                      const std::optional<at::Tensor>& key_scale) {
  need.tensor("query", query, {kAny, kAny}, kFloats);
  need.tensor("key", key, {kAny, query.size(1)}, key_scale ? DTypes(at::kChar) : kFloats);
  need.tensor("key_scale", key_scale, key.size(0), kFloats);
  need.countable({query.size(0), key.size(0)});
  need.countable({std::max(query.size(0), key.size(0)), query.size(1)});
}
inline at::ScalarType similarity_type(const at::Tensor& query, const at::Tensor& key) {
  const bool wide = query.scalar_type() == at::kDouble || key.scalar_type() == at::kDouble;
  return wide ? at::kDouble : at::kFloat;
}

// Calls f(operand, stored) with values of the types that products multiply and that the keys are stored in.
template <class F>
auto with_keys(const at::Tensor& query, const at::Tensor& key, F f) {
  const auto stored = [&](auto operand) {
    return key.scalar_type() == at::kChar ? f(operand, int8_t())
                                          : with_storage(key.scalar_type(), [&](auto s) { return f(operand, s); });
  };
  if (similarity_type(query, key) == at::kDouble) return stored(double());
  const bool paired = query.scalar_type() == at::kBFloat16 && key.scalar_type() == at::kBFloat16;
  if (paired && query.size(0) > kFewSearches && tile_product<bf16>()) return f(bf16(), bf16());
  return stored(float());
}

// Queries and keys as kernels read them. Threads take tiles of keys in turn, each from slots of its own: the keys of a slot
// come in rising order.
template <class P, class S>
struct Search {
  using A = acc_t<P>;
  at::Tensor query, key, scale, a, packed;
  Similarities<P> g;
  int64_t m;
  bool normalize;

  // The queries [n, d] with d > 0, of `width` in a block; of few, which no product multiplies, none is packed.
  Search(const at::Tensor& q, const at::Tensor& k, const std::optional<at::Tensor>& key_scale, bool normalize, bool few)
      : query(q.to(scalar_type<P>()).contiguous()), key(k.contiguous()), m(k.size(0)), normalize(normalize) {
    constexpr auto sums = sizeof(A) == 8 ? at::kDouble : at::kFloat;
    if (key_scale) scale = key_scale->to(sums).contiguous();
    if (normalize) a = at::linalg_vector_norm(q, 2, {-1}, false, sums).clamp_min_(1e-12).reciprocal_();
    g.n = q.size(0), g.d = q.size(1), g.depth = depth_of<P>(g.d);
    g.width = std::min<int64_t>(kTileCols, whole_units(g.n));
    if (!few) packed = pack_transposed<P>(query, g.width);
    g.queries = data<P>(packed), g.a = data<A>(a), g.product = search_product<P>();
  }

  int64_t slots(bool few) const { return std::min<int64_t>(at::get_num_threads(), ceil_div(m, few ? kFewKeys : kTileRows)); }

  // Calls f(slot, j0, rows, tile) for all tiles of keys [j0, j0 + rows), tile(block) giving their similarities [rows][width].
  template <class F>
  void for_tiles(F f) const {
    constexpr bool same = std::is_same_v<S, P>;
    const auto take = [&](Scratch& from) {
      return std::tuple(from.take<P>(kTileRows * g.depth), from.take<A>(kTileRows), from.take<A>(kTileRows * g.width));
    };
    for_blocks(kTileRows, false, take, [&](int64_t slot, int64_t j0, int64_t rows, auto memory) {
      auto [operand, factors, tile] = memory;
      const S* keys = data<S>(key) + j0 * g.d;
      const P* left = operand;
      if constexpr (same) left = g.depth == g.d && rows == kTileRows ? keys : operand;
      // Products of one shape, whose sums ATen's mm forms in one order: equal keys have equal scores
      if (left == operand) VLMK_CALL(retrieval_rows, keys, rows, g.d, kTileRows, g.depth, operand);
      const A* b = key_factors(keys, j0, rows, factors);
      f(slot, j0, rows, [&](int64_t block) {
        VLMK_CALL(retrieval_tile, g, block, left, rows, b, tile);
        return static_cast<const A*>(tile);
      });
    });
  }

  // Calls f(slot, j0, count, scores) with the similarities [n][kFewKeys] of few queries. Only where P is A.
  template <class F>
  void for_few(F f) const {
    const auto take = [&](Scratch& from) {
      return std::tuple(from.take<A>(kFewKeys * g.d), from.take<A>(kFewKeys), from.take<A>(kFewSearches * kFewKeys));
    };
    for_blocks(kFewKeys, true, take, [&](int64_t slot, int64_t j0, int64_t count, auto memory) {
      auto [widened, factors, scores] = memory;
      const S* keys = data<S>(key) + j0 * g.d;
      const A* b = key_factors(keys, j0, count, factors);
      VLMK_CALL(retrieval_few, data<A>(query), g.n, keys, count, g.d, g.a, b, widened, scores, kFewKeys);
      f(slot, j0, count, static_cast<const A*>(scores));
    });
  }

 private:
  const A* key_factors(const S* keys, int64_t j0, int64_t count, A* factors) const {
    if (!normalize) return scale.defined() ? data<A>(scale) + j0 : nullptr;
    VLMK_CALL(retrieval_factors, keys, count, g.d, scale.defined() ? data<A>(scale) + j0 : nullptr, normalize, factors);
    return factors;
  }
  template <class Take, class F>
  void for_blocks(int64_t size, bool few, Take take, F f) const {
    Scratch measure{nullptr};
    take(measure);
    std::atomic<int64_t> next{0};
    for_tasks(slots(few), measure.next - static_cast<char*>(nullptr), [&](int64_t slot, Scratch& scratch) {
      const auto memory = take(scratch);
      for (int64_t j0; (j0 = size * next++) < m;) f(slot, j0, std::min(size, m - j0), memory);
    });
  }
};

// The lists of some rows, one for each slot.
template <class A>
struct Lists {
  at::Tensor found, held, least;
  std::vector<Best<A>> slots;

  Lists(int64_t count, int64_t rows, int64_t k, int64_t room)
      : found(at::empty({count * rows * room * static_cast<int64_t>(sizeof(Found<A>))}, at::kByte)),
        held(at::empty({count * rows}, at::kLong)),
        least(at::empty({count * rows}, sizeof(A) == 8 ? at::kDouble : at::kFloat)) {
    for (int64_t i = 0; i < count; ++i) {
      slots.push_back(
          {rows, k, room, data<Found<A>>(found) + i * rows * room, data<int64_t>(held) + i * rows, data<A>(least) + i * rows});
    }
    clear();
  }
  void clear() {
    held.fill_(0);
    least.fill_(std::numeric_limits<double>::quiet_NaN());
  }
};

// Lists of the k best of `end`, with room for as many again: each choice among them is paid by as many new ones.
inline int64_t room_of(int64_t k, int64_t least, int64_t end) { return std::min(k + std::max(k, least), end + 1); }

// How many blocks of `width` queries are searched for at a time: their lists, of one thread, are not much larger than caches.
inline int64_t blocks_at_once(int64_t blocks, int64_t width, int64_t list_bytes) {
  constexpr int64_t bytes = 1 << 24, most = 4;
  return std::min({blocks, most, std::max<int64_t>(1, bytes / (width * list_bytes))});
}

// Calls finish(row, memory of all lists of a row) for rows [0, rows).
template <class A, class Finish>
void for_rows(const Lists<A>& lists, int64_t rows, Finish finish) {
  constexpr int64_t some = 16;
  const int64_t room = static_cast<int64_t>(lists.slots.size()) * lists.slots[0].room;
  for_tasks(ceil_div(rows, some), room * sizeof(Found<A>), [&](int64_t task, Scratch& scratch) {
    auto* memory = scratch.take<Found<A>>(room);
    for (int64_t row = task * some; row < std::min(rows, (task + 1) * some); ++row) finish(row, memory);
  });
}

// Which queries and keys match, by index or by id: key i matches query i without either.
struct Matches {
  at::Tensor query, key;
  Labels labels;

  Matches(const char* op, const Need& need, const at::Tensor& q, const at::Tensor& k,
          const std::optional<at::Tensor>& positives, const std::optional<at::Tensor>& key_ids) {
    const int64_t n = q.size(0), m = k.size(0);
    need.tensor("positives", positives, n, at::kLong);
    need.tensor("key_ids", key_ids, m, at::kLong);
    need.that(positives || !key_ids, "key_ids require the ids of the queries in positives, got None");
    need.that(positives || n <= m, "without positives, M must be at least N, got N = ", n, " and M = ", m);
    query = positives ? positives->contiguous() : at::arange(n, at::kLong);
    key = key_ids ? key_ids->contiguous() : at::arange(m, at::kLong);
    labels = {data<int64_t>(query), data<int64_t>(key)};
    if (!positives || key_ids) return;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = labels.query[i];
      TORCH_CHECK_INDEX(at == -100 || (at >= 0 && at < m), op, ": positives must be in [0, M = ", m,
                        ") or -100, got values from ", query.min().item<int64_t>(), " to ", query.max().item<int64_t>());
    }
  }
};

// The best match of each query and, unless there are no `keys`, of each key. Only the tiles that have matches are formed.
template <class P, class S>
struct BestMatches {
  using A = acc_t<P>;
  at::Tensor scores, any;  // [n + m]
  BestMatch<A> queries, keys;

  BestMatches(const Search<P, S>& search, const Labels& labels, bool with_keys) {
    const auto sums = sizeof(A) == 8 ? at::kDouble : at::kFloat;
    const int64_t n = search.g.n, slots = search.slots(false), size = n + (with_keys ? search.m : 0);
    scores = at::full({size}, -std::numeric_limits<double>::infinity(), sums), any = at::zeros({size}, at::kByte);
    queries = {data<A>(scores), data<uint8_t>(any)};
    keys = with_keys ? BestMatch<A>{queries.score + n, queries.any + n} : BestMatch<A>{nullptr, nullptr};
    const at::Tensor parts = at::full({slots, n}, -std::numeric_limits<double>::infinity(), sums);
    const at::Tensor found = at::zeros({slots, n}, at::kByte);
    search.for_tiles([&](int64_t slot, int64_t j0, int64_t rows, auto products) {
      const BestMatch<A> own{data<A>(parts) + slot * n, data<uint8_t>(found) + slot * n};
      for (int64_t block = 0; block < search.g.blocks(); ++block) {
        const int64_t i0 = block * search.g.width, cols = std::min(search.g.width, n - i0);
        if (!VLMK_CALL(retrieval_any_match, labels, i0, cols, j0, rows)) continue;
        VLMK_CALL(retrieval_best, labels, i0, cols, j0, rows, products(block), search.g.width, own, keys);
      }
    });
    for (int64_t slot = 0; slot < slots; ++slot) {
      for (int64_t i = 0; i < n; ++i) {
        const A score = data<A>(parts)[slot * n + i];
        queries.any[i] |= data<uint8_t>(found)[slot * n + i];
        if (score > queries.score[i] || score != score) queries.score[i] = score;
      }
    }
  }
};

}  // namespace vlmk
