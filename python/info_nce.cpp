// vlmkernels::info_nce_stats and info_nce_grads for CPU tensors (contracts: vlmkernels/ops/_info_nce_sweeps.py).
#include "vlmkernels/info_nce.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/unbind.h>
#include <torch/library.h>

#include "pairwise.h"

namespace vlmk {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kMinimumWorkspace = int64_t(1) << 25;  // bytes of recomputed tiles that may be held at once

const TileInfo& info_of(const Tensor& store, int64_t offset) {
  return *reinterpret_cast<const TileInfo*>(data<char>(store) + offset);
}

// How many tiles of type P the store holds; none where the forward worked in another type (oneDNN switched off in between).
template <class P>
int64_t tiles_in(const Tensor& store) {
  if (store.numel() < tile_bytes<P>() || info_of(store, 0).element_size != sizeof(P)) return 0;
  return store.numel() / tile_bytes<P>();
}

// Whether a stored tile has to be computed again.
template <class P>
bool any_absent(const Tensor& store, int64_t stored) {
  for (int64_t tile = 0; tile < stored; ++tile) {
    if (info_of(store, tile * tile_bytes<P>()).kind == TileKind::absent) return true;
  }
  return false;
}

void need_inputs(const Need& need, const Tensor& query, const Tensor& key, const Tensor& scale, const optional<Tensor>& a,
                 const optional<Tensor>& b, const Tensor& positives) {
  need_features(need, query, key, scale, a, b);
  need.that(query.size(0) > 0 && key.size(0) > 0, "query and key must have rows, got sizes ", query.sizes(), " and ",
            key.sizes());
  need.indices("positives", positives, query.size(0), key.size(0));
}

auto info_nce_stats(const Tensor& query, const Tensor& key, const Tensor& scale, const optional<Tensor>& a,
                    const optional<Tensor>& b, const Tensor& positives, bool columns, int64_t store_size,
                    int64_t /*workspace_bytes*/) {
  const Need need("info_nce_stats");
  need_inputs(need, query, key, scale, a, b, positives);
  need.that(store_size >= 0, "store_size must not be negative, got ", store_size);
  return with_operand(query.scalar_type(), [&](auto type) {
    using P = decltype(type);
    using A = acc_t<P>;
    Features<P> features(query, key, scale, a, b);
    features.pack_kt();
    const Pairs<P>& p = features.pairs;
    const auto options = query.options().dtype(scalar_type<A>());
    const int64_t chunk_rows = chunk_of(p.row_blocks(), 128), chunk_cols = chunk_of(p.col_blocks(), 64);
    const int64_t row_parts = ceil_div(p.row_blocks(), chunk_rows), col_parts = ceil_div(p.col_blocks(), chunk_cols);
    const Tensor row_part = at::empty({3, col_parts, p.n}, options);
    const Tensor col_part = at::empty({3, columns ? row_parts : 0, p.m}, options);
    const Tensor positive = at::full({p.n}, -std::numeric_limits<A>::infinity(), options);
    const Tensor store = on_huge_pages(at::empty({store_size}, query.options().dtype(at::kByte)));
    const Tensor index = positives.contiguous();
    const int64_t stored = store_size / tile_bytes<P>();
    const auto moments = [](const Tensor& t) {  // [3, ...]
      A* first = data<A>(t);
      const int64_t size = t.numel() / 3;
      return Moments<A>{first, first + size, first + 2 * size};
    };
    const InfoNceStats<P> g{p,
                            data<int64_t>(index),
                            columns,
                            chunk_rows,
                            chunk_cols,
                            moments(row_part),
                            moments(col_part),
                            data<A>(positive),
                            data<char>(store),
                            std::min(stored, p.row_blocks() * p.col_blocks())};
    for_tasks(row_parts * col_parts, (kTileSize + 3 * kTileCols) * sizeof(A), [&](int64_t task, Scratch& scratch) {
      VLMK_CALL(info_nce_stats, g, task / col_parts, task % col_parts, scratch.take<A>(kTileSize + 3 * kTileCols));
    });
    const int64_t used = g.stored_tiles * tile_bytes<P>();
    if (used < store_size) std::memset(data<char>(store) + used, 0, store_size - used);
    const auto merged = [&](const Tensor& part, int64_t parts, int64_t count) {
      const Tensor out = at::empty({3, count}, options);
      at::parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
        VLMK_CALL(info_nce_merge, moments(part), parts, count, begin, end, moments(out));
      });
      return out.unbind(0);
    };
    const auto rows = merged(row_part, col_parts, p.n), cols = merged(col_part, row_parts, columns ? p.m : 0);
    return std::make_tuple(rows[0], rows[1], rows[2], positive, cols[0], cols[1], cols[2], store);
  });
}

auto info_nce_grads(const Tensor& query, const Tensor& key, const Tensor& scale, const optional<Tensor>& a,
                    const optional<Tensor>& b, const Tensor& positives, const Tensor& row_max, const Tensor& row_log,
                    const Tensor& col_max, const Tensor& col_log, const Tensor& row_coef, const Tensor& col_coef,
                    const Tensor& positive_coef, const optional<Tensor>& query_extra, const optional<Tensor>& key_extra,
                    const Tensor& store, int64_t workspace_bytes, bool need_query, bool need_key) {
  const Need need("info_nce_grads");
  need_inputs(need, query, key, scale, a, b, positives);
  need.that(workspace_bytes >= 0, "workspace_bytes must not be negative, got ", workspace_bytes);
  const int64_t n = query.size(0), m = key.size(0), d = query.size(1), cols = col_max.numel() ? m : 0;
  const auto sums = sum_type(query.scalar_type());
  need.tensor("row_max", row_max, n, sums);
  need.tensor("row_log", row_log, n, sums);
  need.tensor("row_coef", row_coef, n, sums);
  need.tensor("col_max", col_max, cols, sums);
  need.tensor("col_log", col_log, cols, sums);
  need.tensor("col_coef", col_coef, cols, sums);
  need.tensor("positive_coef", positive_coef, n, sums);
  need.tensor("query_extra", query_extra, {n, d}, sums);
  need.tensor("key_extra", key_extra, {m, d}, sums);
  need.contiguous("store", store, kAny, at::kByte);
  need.that(reinterpret_cast<uintptr_t>(store.const_data_ptr()) % alignof(TileInfo) == 0, "store must be aligned to ",
            alignof(TileInfo), " bytes");
  return with_operand(query.scalar_type(), [&](auto type) {
    using P = decltype(type);
    using A = acc_t<P>;
    Features<P> features(query, key, scale, a, b);
    Pairs<P>& p = features.pairs;
    const int64_t row_blocks = p.row_blocks(), col_blocks = p.col_blocks();
    const int64_t stored = std::min(tiles_in<P>(store), row_blocks * col_blocks);
    const bool columns = col_max.numel() > 0;
    if (stored < row_blocks * col_blocks || any_absent<P>(store, stored)) features.pack_kt();
    if (need_query) features.pack_k();
    const auto options = query.options().dtype(scalar_type<A>());
    const Tensor dquery = on_huge_pages(at::empty({need_query ? p.n : 0, p.d}, features.query.options()));
    const Tensor dkey = on_huge_pages(at::empty({need_key ? p.m : 0, p.d}, features.query.options()));
    const Tensor query_dot = at::empty({need_query ? p.n : 0}, options), key_dot = at::empty({need_key ? p.m : 0}, options);
    const Tensor key_sums = on_huge_pages(at::empty({need_key ? col_blocks * p.d * kTileCols : 0}, options));
    if (p.n == 0) key_sums.zero_();
    const Tensor index = positives.contiguous(), u = row_coef.contiguous(), v = col_coef.contiguous(),
                 w = positive_coef.contiguous();
    const Tensor rm = row_max.contiguous(), rl = row_log.contiguous(), cm = col_max.contiguous(), cl = col_log.contiguous();
    const Tensor extra_q = contiguous(query_extra), extra_k = contiguous(key_extra);

    // Row blocks go through in chunks whose recomputed tiles fit the workspace; one chunk when everything is stored.
    const int64_t capacity = std::max(kMinimumWorkspace, workspace_bytes) / tile_bytes<P>();
    const auto missing = [&](int64_t first, int64_t last) {
      return std::max<int64_t>(0, last * col_blocks - std::max(first * col_blocks, stored));
    };
    const auto end_of_chunk = [&](int64_t first) {
      int64_t last = first + 1;
      while (last < row_blocks && missing(first, last + 1) <= capacity) ++last;
      return last;
    };
    int64_t most = 0;
    for (int64_t first = 0; first < row_blocks; first = end_of_chunk(first))
      most = std::max(most, missing(first, end_of_chunk(first)));
    const Tensor workspace = on_huge_pages(at::empty({most * tile_bytes<P>()}, query.options().dtype(at::kByte)));

    InfoNceGrads<P> g{p,
                      data<int64_t>(index),
                      data<A>(rm),
                      data<A>(rl),
                      data<A>(u),
                      columns ? data<A>(cm) : nullptr,
                      columns ? data<A>(cl) : nullptr,
                      columns ? data<A>(v) : nullptr,
                      data<A>(w),
                      data<char>(store),
                      stored,
                      data<char>(workspace),
                      0,
                      0,
                      data<A>(key_sums),
                      {data<P>(features.query), p.d, data<A>(extra_q), p.a, data<P>(dquery), data<A>(query_dot)},
                      {data<P>(features.key), p.d, data<A>(extra_k), p.b, data<P>(dkey), data<A>(key_dot)}};
    const int64_t tile = kTileSize * sizeof(A), operands = (kKeyTiles<P> + 1) * kTileSize * sizeof(P),
                  parts = depth_parts(col_blocks, p.d);
    for (int64_t first = 0; first < row_blocks; first = g.last) {
      g.first = first, g.last = end_of_chunk(first);
      if (need_key) features.pack_qt(g.first, g.last);
      g.pairs = p;
      const int64_t skip = std::max(g.first * col_blocks, stored);
      for_tasks(missing(g.first, g.last), tile, [&](int64_t task, Scratch& scratch) {
        VLMK_CALL(info_nce_recompute, g, (skip + task) / col_blocks, (skip + task) % col_blocks, scratch.take<A>(kTileSize));
      });
      if (need_query) {
        const int64_t size = kTileRows * p.depth;
        for_tasks(g.last - g.first, size * sizeof(A) + tile + operands + 256, [&](int64_t task, Scratch& scratch) {
          A *out = scratch.take<A>(size), *s = scratch.take<A>(kTileSize);
          VLMK_CALL(info_nce_query, g, g.first + task, out, s, scratch.take<P>(2 * kTileSize));
        });
      }
      if (need_key) {
        for_tasks(col_blocks * parts, tile + operands + 256, [&](int64_t task, Scratch& scratch) {
          const int64_t part = task % parts, d0 = part * p.d / parts, d1 = (part + 1) * p.d / parts;
          A* s = scratch.take<A>(kTileSize);
          VLMK_CALL(info_nce_key, g, task / parts, d0, d1, first > 0, s, scratch.take<P>((kKeyTiles<P> + 1) * kTileSize));
        });
      }
    }
    if (need_key) {
      for_tasks(col_blocks, kTileCols * p.d * sizeof(A) + 256,
                [&](int64_t jb, Scratch& scratch) { VLMK_CALL(info_nce_finish_key, g, jb, scratch.take<A>(kTileCols * p.d)); });
    }
    return std::make_tuple(as_given(dquery, query, need_query), as_given(dkey, key, need_key), query_dot, key_dot);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) {
  m.impl("info_nce_stats", &info_nce_stats);
  m.impl("info_nce_grads", &info_nce_grads);
}

}  // namespace vlmk
