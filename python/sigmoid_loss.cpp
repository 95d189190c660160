// vlmkernels::sigmoid_sweep for CPU tensors (contract: vlmkernels/ops/_sigmoid_loss_sweep.py).
#include "vlmkernels/sigmoid_loss.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "pairwise.h"

namespace vlmk {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kWorkspace = int64_t(1) << 25;  // bytes of gradient tiles held at once, or one row block's

auto sigmoid_sweep(const Tensor& query, const Tensor& key, const Tensor& scale, const Tensor& bias, const optional<Tensor>& a,
                   const optional<Tensor>& b, const optional<Tensor>& positives, const optional<Tensor>& query_ids,
                   const optional<Tensor>& key_ids, const Tensor& row_coef, bool need_loss, bool need_query, bool need_key,
                   bool need_scalars) {
  const Need need("sigmoid_loss (sigmoid_sweep)");
  need_features(need, query, key, scale, a, b);
  need.scalar("bias", bias);
  const int64_t n = query.size(0), m = key.size(0);
  if (positives) need.indices("positives", *positives, n, m);
  need.tensor("query_ids", query_ids, n, at::kLong);
  need.tensor("key_ids", key_ids, m, at::kLong);
  need.that(query_ids.has_value() == key_ids.has_value() && positives.has_value() != query_ids.has_value(),
            "either positives, or query_ids and key_ids must be given");
  need.tensor("row_coef", row_coef, n, sum_type(query.scalar_type()));
  return with_operand(query.scalar_type(), [&](auto type) {
    using P = decltype(type);
    using A = acc_t<P>;
    Features<P> features(query, key, scale, a, b);
    Pairs<P>& p = features.pairs;
    const int64_t row_blocks = p.row_blocks(), col_blocks = p.col_blocks();
    const bool need_grad = need_query || need_key || need_scalars;
    features.pack_kt();
    if (need_query) features.pack_k();
    const auto options = query.options().dtype(scalar_type<A>());
    const Tensor index = contiguous(positives), row_ids = contiguous(query_ids), col_ids = contiguous(key_ids);
    const Tensor coef = row_coef.contiguous();
    const int64_t chunk_cols = chunk_of(col_blocks, 64), chunks = std::max<int64_t>(1, ceil_div(col_blocks, chunk_cols));
    const Tensor parts = at::empty({3, chunks, p.n}, options);
    const Tensor dquery = on_huge_pages(at::empty({need_query ? p.n : 0, p.d}, features.query.options()));
    const Tensor dkey = on_huge_pages(at::empty({need_key ? p.m : 0, p.d}, features.query.options()));
    const Tensor dots = at::empty({p.n + p.m}, options);
    const Tensor key_sums = on_huge_pages(at::empty({need_key ? col_blocks * p.d * kTileCols : 0}, options));
    if (p.n == 0) key_sums.zero_();
    const int64_t row_bytes = col_blocks * kTileSize * static_cast<int64_t>(sizeof(P));
    const int64_t step =
        need_grad ? std::clamp<int64_t>(kWorkspace / std::max<int64_t>(row_bytes, 1), 1, std::max<int64_t>(row_blocks, 1))
                  : std::max<int64_t>(row_blocks, 1);
    const Tensor tiles = on_huge_pages(at::empty({need_grad ? step * col_blocks * kTileSize : 0}, features.query.options()));
    A* sums = data<A>(parts);
    SigmoidLoss<P> g{p,
                     number<A>(bias),
                     data<int64_t>(index),
                     data<int64_t>(row_ids),
                     data<int64_t>(col_ids),
                     data<A>(coef),
                     need_loss,
                     need_grad,
                     chunk_cols,
                     sums,
                     sums + chunks * p.n,
                     sums + 2 * chunks * p.n,
                     data<P>(tiles),
                     0,
                     0,
                     data<A>(key_sums),
                     {data<P>(features.query), p.d, nullptr, p.a, data<P>(dquery), data<A>(dots)},
                     {data<P>(features.key), p.d, nullptr, p.b, data<P>(dkey), data<A>(dots) + p.n}};
    const int64_t operand = kKeyTiles<P> * kTileSize * sizeof(P) + 64, split = depth_parts(col_blocks, p.d);
    for (int64_t first = 0; first < row_blocks; first = g.last) {
      g.first = first, g.last = std::min(first + step, row_blocks);
      if (need_key) features.pack_qt(g.first, g.last);
      g.pairs = p;
      for_tasks((g.last - first) * chunks, kTileSize * sizeof(A), [&](int64_t task, Scratch& scratch) {
        VLMK_CALL(sigmoid_loss_tiles, g, first + task / chunks, task % chunks, scratch.take<A>(kTileSize));
      });
      if (need_query) {
        for_tasks(g.last - first, kTileRows * p.depth * sizeof(A) + operand + 64, [&](int64_t task, Scratch& scratch) {
          A* out = scratch.take<A>(kTileRows * p.depth);
          VLMK_CALL(sigmoid_loss_query, g, first + task, out, scratch.take<P>(kTileSize));
        });
      }
      if (need_key) {
        for_tasks(col_blocks * split, operand, [&](int64_t task, Scratch& scratch) {
          const int64_t part = task % split;
          VLMK_CALL(sigmoid_loss_key, g, task / split, part * p.d / split, (part + 1) * p.d / split, first > 0,
                    scratch.take<P>(kKeyTiles<P> * kTileSize));
        });
      }
    }
    if (need_key) {
      for_tasks(col_blocks, kTileCols * p.d * sizeof(A), [&](int64_t jb, Scratch& scratch) {
        VLMK_CALL(sigmoid_loss_finish_key, g, jb, scratch.take<A>(kTileCols * p.d));
      });
    }
    // The column chunks are added in their order.
    for (int64_t which = 0; which < 3; ++which) {
      A* parts_of = sums + which * chunks * p.n;
      for (int64_t i = 0; i < p.n; ++i) {
        double total = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) total += parts_of[chunk * p.n + i];
        parts_of[i] = static_cast<A>(total);
      }
    }
    const auto row_sums = [&](int64_t which, bool need) {
      const Tensor out = at::empty({need ? p.n : 0}, options);
      if (need && p.n) std::memcpy(out.data_ptr(), sums + which * chunks * p.n, p.n * sizeof(A));
      return out;
    };
    return std::make_tuple(row_sums(0, need_loss), as_given(dquery, query, need_query), as_given(dkey, key, need_key),
                           row_sums(2, need_scalars), row_sums(1, need_scalars));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) { m.impl("sigmoid_sweep", &sigmoid_sweep); }

}  // namespace vlmk
