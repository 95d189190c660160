// vlmkernels::contrastive_distillation_stats and contrastive_distillation_grads for CPU tensors (contracts:
// vlmkernels/ops/_contrastive_distillation_sweeps.py).
#include "vlmkernels/contrastive_distillation.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "pairwise.h"

namespace vlmk {
namespace {

using at::Tensor;

// Bytes of gradient tiles held at once, unless one row of them is more: they stay in the cache until both products have read
// them, and malloc gives the same memory again, whose pages are there.
constexpr int64_t kWorkspace = int64_t(3) << 23;

void need_inputs(const Need& need, const Tensor& query, const Tensor& key, const Tensor& scale, const Tensor& teacher_query,
                 const Tensor& teacher_key, const Tensor& teacher_scale) {
  need_features(need, query, key, scale);
  const int64_t n = query.size(0), m = key.size(0);
  need.that(n > 0 && m > 0, "query and key must have rows, got sizes ", query.sizes(), " and ", key.sizes());
  need_teacher(need, query, key, teacher_query, teacher_key, teacher_scale);
}

auto contrastive_distillation_stats(const Tensor& query, const Tensor& key, const Tensor& scale, const Tensor& teacher_query,
                                    const Tensor& teacher_key, const Tensor& teacher_scale, bool columns, bool cross_entropy,
                                    int64_t store_size) {
  const Need need("contrastive_distillation_stats");
  need_inputs(need, query, key, scale, teacher_query, teacher_key, teacher_scale);
  need.that(store_size >= 0, "store_size must not be negative, got ", store_size);
  return with_operand(query.scalar_type(), [&](auto type) {
    using P = decltype(type);
    using A = acc_t<P>;
    Features<P> student(query, key, scale, {}, {}), teacher(teacher_query, teacher_key, teacher_scale, {}, {});
    student.pack_kt();
    teacher.pack_kt();
    const Pairs<P>& p = student.pairs;
    const auto options = query.options().dtype(scalar_type<A>());
    const int64_t chunk_rows = chunk_of(p.row_blocks(), 128), chunk_cols = chunk_of(p.col_blocks(), 64);
    const int64_t row_parts = ceil_div(p.row_blocks(), chunk_rows), col_parts = ceil_div(p.col_blocks(), chunk_cols);
    const int64_t row_count = col_parts * p.n, col_count = columns ? row_parts * p.m : 0;
    const Tensor row_maxima = at::empty({2, row_count}, options), col_maxima = at::empty({2, col_count}, options);
    const Tensor row_sums = at::empty({5, row_count}, options.dtype(at::kDouble)),
                 col_sums = at::empty({5, col_count}, options.dtype(at::kDouble));
    const Tensor store = on_huge_pages(at::empty({store_size}, query.options().dtype(at::kByte)));
    const ContrastiveDistillationStats<P> g{
        p,
        teacher.pairs,
        columns,
        chunk_rows,
        chunk_cols,
        logit_sums(data<A>(row_maxima), data<double>(row_sums), row_count),
        logit_sums(data<A>(col_maxima), data<double>(col_sums), col_count),
        data<A>(store),
        std::min<int64_t>(store_size / (2 * kTileSize * sizeof(A)), p.row_blocks() * p.col_blocks())};
    for_tasks(row_parts * col_parts, 2 * kTileSize * sizeof(A), [&](int64_t task, Scratch& scratch) {
      VLMK_CALL(contrastive_distillation_stats, g, task / col_parts, task % col_parts, scratch.take<A>(2 * kTileSize));
    });
    const auto merged = [&](const LogitSums<A>& parts, int64_t part_count, int64_t count) {
      const Tensor loss = at::empty({count}, options), out = at::empty({5, count}, options);
      at::parallel_for(0, count, 512, [&](int64_t begin, int64_t end) {
        VLMK_CALL(contrastive_distillation_merge, parts, part_count, count, begin, end, cross_entropy, data<A>(loss),
                  data<A>(out));
      });
      return std::make_pair(loss, out);
    };
    const auto [row_loss, rows] = merged(g.rows, col_parts, p.n);
    const auto [col_loss, cols] = merged(g.cols, row_parts, columns ? p.m : 0);
    return std::make_tuple(row_loss, rows, col_loss, cols, store);
  });
}

template <class A>
LogSumExps<A> log_sum_exps(const Tensor& t) {  // [5, count]
  const A* first = data<A>(t);
  const int64_t count = t.size(1);
  return {first, first + count, first + 2 * count, first + 3 * count};
}

auto contrastive_distillation_grads(const Tensor& query, const Tensor& key, const Tensor& scale, const Tensor& teacher_query,
                                    const Tensor& teacher_key, const Tensor& teacher_scale, const Tensor& rows,
                                    const Tensor& cols, const Tensor& row_coef, const Tensor& col_coef, const Tensor& store,
                                    int64_t workspace_bytes, bool need_query, bool need_key) {
  const Need need("contrastive_distillation_grads");
  need_inputs(need, query, key, scale, teacher_query, teacher_key, teacher_scale);
  need.that(workspace_bytes >= 0, "workspace_bytes must not be negative, got ", workspace_bytes);
  const auto sums = sum_type(query.scalar_type());
  const bool columns = cols.numel() > 0;
  need.tensor("rows", rows, {5, query.size(0)}, sums);
  need.tensor("cols", cols, {5, columns ? key.size(0) : 0}, sums);
  need.tensor("row_coef", row_coef, query.size(0), sums);
  need.tensor("col_coef", col_coef, columns ? key.size(0) : 0, sums);
  need.contiguous("store", store, kAny, at::kByte);
  need.that(reinterpret_cast<uintptr_t>(store.const_data_ptr()) % sizeof(double) == 0, "store must be aligned to ",
            sizeof(double), " bytes");
  return with_operand(query.scalar_type(), [&](auto type) {
    using P = decltype(type);
    using A = acc_t<P>;
    Features<P> student(query, key, scale, {}, {}), teacher(teacher_query, teacher_key, teacher_scale, {}, {});
    const Pairs<P>& p = student.pairs;
    const int64_t row_blocks = p.row_blocks(), col_blocks = p.col_blocks();
    const int64_t stored = std::min<int64_t>(store.numel() / (2 * kTileSize * sizeof(A)), row_blocks * col_blocks);
    const bool any = need_query || need_key;
    if (any && stored < row_blocks * col_blocks) {
      student.pack_kt();
      teacher.pack_kt();
    }
    if (need_query) student.pack_k();
    const auto options = query.options().dtype(scalar_type<A>());
    const Tensor dquery = on_huge_pages(at::empty({need_query ? p.n : 0, p.d}, student.query.options()));
    const Tensor dkey = on_huge_pages(at::empty({need_key ? p.m : 0, p.d}, student.query.options()));
    const Tensor query_dot = at::empty({need_query ? p.n : 0}, options), key_dot = at::empty({need_key ? p.m : 0}, options);
    const Tensor key_sums = on_huge_pages(at::empty({need_key ? col_blocks * p.d * kTileCols : 0}, options));
    const Tensor row_stats = rows.contiguous(), col_stats = cols.contiguous(), u = row_coef.contiguous(),
                 v = col_coef.contiguous();
    const int64_t row_bytes = col_blocks * kTileSize * static_cast<int64_t>(sizeof(P));
    const int64_t step = std::clamp<int64_t>(kWorkspace / row_bytes, 1, row_blocks);
    const Tensor tiles = on_huge_pages(at::empty({any ? step * col_blocks * kTileSize : 0}, student.query.options()));
    ContrastiveDistillationGrads<P> g{p,
                                      teacher.pairs,
                                      log_sum_exps<A>(row_stats),
                                      log_sum_exps<A>(col_stats),
                                      data<A>(u),
                                      data<A>(v),
                                      data<A>(store),
                                      stored,
                                      data<P>(tiles),
                                      0,
                                      0,
                                      data<A>(key_sums),
                                      {data<P>(student.query), p.d, nullptr, nullptr, data<P>(dquery), data<A>(query_dot)},
                                      {data<P>(student.key), p.d, nullptr, nullptr, data<P>(dkey), data<A>(key_dot)}};
    const int64_t split = depth_parts(col_blocks, p.d), key_tasks = need_key ? col_blocks * split : 0;
    const int64_t sums_size = kTileRows * p.depth, operand_size = kKeyTiles<P> * kTileSize;
    for (int64_t first = 0; any && first < row_blocks; first = g.last) {
      g.first = first, g.last = std::min(first + step, row_blocks);
      if (need_key) student.pack_qt(g.first, g.last);
      g.student = p;
      for_tasks((g.last - first) * col_blocks, 2 * kTileSize * sizeof(A), [&](int64_t task, Scratch& scratch) {
        VLMK_CALL(contrastive_distillation_tile, g, first + task / col_blocks, task % col_blocks,
                  scratch.take<A>(2 * kTileSize));
      });
      const int64_t query_tasks = need_query ? g.last - first : 0,
                    bytes = std::max(sums_size * sizeof(A), operand_size * sizeof(P));
      for_tasks(query_tasks + key_tasks, bytes, [&](int64_t task, Scratch& scratch) {
        if (task < query_tasks) {
          VLMK_CALL(contrastive_distillation_query, g, first + task, scratch.take<A>(sums_size));
        } else {
          const int64_t jb = (task - query_tasks) / split, part = (task - query_tasks) % split;
          VLMK_CALL(contrastive_distillation_key, g, jb, part * p.d / split, (part + 1) * p.d / split, first > 0,
                    scratch.take<P>(operand_size));
        }
      });
    }
    if (need_key) {
      for_tasks(col_blocks, kTileCols * p.d * sizeof(A), [&](int64_t jb, Scratch& scratch) {
        VLMK_CALL(contrastive_distillation_finish_key, g, jb, scratch.take<A>(kTileCols * p.d));
      });
    }
    return std::make_tuple(as_given(dquery, query, need_query), as_given(dkey, key, need_key),
                           need_query ? query_dot : key_dot);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) {
  m.impl("contrastive_distillation_stats", &contrastive_distillation_stats);
  m.impl("contrastive_distillation_grads", &contrastive_distillation_grads);
}

}  // namespace vlmk
