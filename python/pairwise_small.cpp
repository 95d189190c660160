// vlmkernels::small_loss and small_loss_bwd for CPU tensors (contracts: vlmkernels/ops/_pairwise_small.py).
#include "vlmkernels/pairwise_small.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <torch/library.h>

#include "pairwise.h"

namespace vlmk {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t whole_vectors(int64_t count) { return round_up(count, kSmallCols); }

optional<Tensor> inverse_norms(const Tensor& x, bool normalize) {
  if (!normalize) return std::nullopt;
  const auto work = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return at::linalg_vector_norm(x, 2, at::IntArrayRef{-1}, false, work).clamp_min_(1e-12).reciprocal_();
}

// What the slopes are kept in: the precision of the features, of which float16 lacks the range.
at::ScalarType slope_type(const Tensor& x) { return x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type(); }

void need_inputs(const Need& need, const Tensor& query, const Tensor& key, const Tensor& scale, const optional<Tensor>& bias) {
  need_features(need, query, key, scale);
  if (bias) need.scalar("bias", *bias);
  const int64_t n = query.size(0), m = key.size(0);
  need.that(n > 0 && m >= n, "query and key must have rows, key as many or more, got ", n, " and ", m);
}

auto small_loss(const Tensor& query, const Tensor& key, const Tensor& scale, const optional<Tensor>& bias, bool symmetric,
                double smoothing, bool normalize, bool need_query, bool need_key, bool need_scalars) {
  const Need need(bias ? "sigmoid_loss (small_loss)" : "info_nce (small_loss)");
  need_inputs(need, query, key, scale, bias);
  need.that(!symmetric || query.size(0) == key.size(0), "a symmetric loss needs as many keys as queries, got ", key.size(0),
            " and ", query.size(0));
  return with_operand(query.scalar_type(), [&](auto type) {
    using P = decltype(type);
    using A = acc_t<P>;
    const auto a = inverse_norms(query, normalize), b = inverse_norms(key, normalize);
    Features<P> features(query, key, scale, a, b);
    features.pack_kt(kSmallCols);
    const Pairs<P>& p = features.pairs;
    const int64_t blocks = ceil_div(p.n, kSmallRows), ldx = whole_vectors(p.m), ldt = whole_vectors(p.n);
    const bool need_slopes = need_query || need_key || need_scalars;
    const auto options = query.options().dtype(scalar_type<A>()), operands = features.query.options();

    const Tensor slope = at::empty({need_query ? p.n : 0, ldx}, operands),
                 slope_t = at::empty({need_key ? p.m : 0, ldt}, operands);
    const Tensor positive = at::empty({need_slopes ? p.n : 0}, options);
    const int64_t column_part = symmetric ? p.m : 0;
    const Tensor work = at::empty({p.n * ldx + 3 * p.n + (2 + 3 * blocks) * column_part}, options);
    const Tensor sums = at::empty({3 * p.n}, options.dtype(at::kDouble));
    A* next = data<A>(work);
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    PairwiseSmall<P> g{};
    g.pairs = p, g.ldx = ldx, g.ldt = ldt;
    g.bias = bias ? number<A>(*bias) : A(0), g.symmetric = symmetric, g.smoothing = static_cast<A>(smoothing);
    g.x = take(p.n * ldx), g.diagonal = take(p.n), g.row_max = take(p.n), g.row_log = take(p.n), g.col_max = take(column_part),
    g.col_log = take(column_part);
    g.part_max = take(blocks * column_part), g.part_sum = take(blocks * column_part), g.part_total = take(blocks * column_part);
    g.loss = data<double>(sums), g.dscale = g.loss + p.n, g.dbias = g.loss + 2 * p.n;
    g.slope = data<P>(slope), g.slope_t = data<P>(slope_t), g.positive = data<A>(positive), g.need_slopes = need_slopes;

    const int64_t scratch_bytes = kSmallRows * ldx * sizeof(A);
    double columns = 0;
    if (bias) {
      for_tasks(blocks, scratch_bytes,
                [&](int64_t ib, Scratch& scratch) { VLMK_CALL(small_logistic, g, ib, scratch.take<A>(kSmallRows * ldx)); });
    } else {
      for_tasks(blocks, 0, [&](int64_t ib, Scratch&) { VLMK_CALL(small_cross_entropy_rows, g, ib); });
      if (symmetric) columns = VLMK_CALL(small_cross_entropy_columns, g);
      if (need_slopes) {
        for_tasks(blocks, scratch_bytes, [&](int64_t ib, Scratch& scratch) {
          VLMK_CALL(small_cross_entropy_slopes, g, ib, scratch.take<A>(kSmallRows * ldx));
        });
      }
    }
    const auto total = [&](const double* rows) {
      double sum = 0;
      for (int64_t i = 0; i < p.n; ++i) sum += rows[i];
      return sum;
    };
    const Tensor loss = at::empty({}, options), dscalars = at::empty({need_scalars ? 2 : 0}, options);
    *data<A>(loss) = static_cast<A>((symmetric ? 0.5 : 1.0) * (total(g.loss) / p.n + columns / p.m));
    if (need_scalars) {
      data<A>(dscalars)[0] = static_cast<A>(total(g.dscale));
      data<A>(dscalars)[1] = bias ? static_cast<A>(total(g.dbias)) : A(0);
    }
    return std::make_tuple(loss, slope.to(slope_type(query)), slope_t.to(slope_type(key)), positive, dscalars);
  });
}

auto small_loss_bwd(const Tensor& dloss, const Tensor& query, const Tensor& key, const Tensor& scale,
                    const optional<Tensor>& bias, const Tensor& slope, const Tensor& slope_t, const Tensor& positive,
                    const Tensor& dscalars, bool normalize, std::array<bool, 4> needs) {
  const Need need(bias ? "sigmoid_loss (small_loss_bwd)" : "info_nce (small_loss_bwd)");
  need_inputs(need, query, key, scale, bias);
  const int64_t n = query.size(0), m = key.size(0);
  const auto sums = sum_type(query.scalar_type());
  need.scalar("dloss", dloss);
  if (needs[0]) need.contiguous("slope", slope, {n, whole_vectors(m)}, slope_type(query));
  if (needs[1]) need.contiguous("slope_t", slope_t, {m, whole_vectors(n)}, slope_type(query));
  if (needs[0] || needs[1]) need.contiguous("positive", positive, n, sums);
  if (needs[2] || needs[3]) need.contiguous("dscalars", dscalars, 2, sums);
  need.that(bias || !needs[3], "bias must be given for its gradient");
  return with_operand(query.scalar_type(), [&](auto type) {
    using P = decltype(type);
    using A = acc_t<P>;
    const bool need_query = needs[0], need_key = needs[1];
    const auto a = inverse_norms(query, normalize), b = inverse_norms(key, normalize);
    const Features<P> features(query, key, scale, a, b);
    const Pairs<P>& p = features.pairs;
    const Tensor by_query = slope.to(scalar_type<P>()), by_key = slope_t.to(scalar_type<P>());
    const auto operands = features.query.options();
    const double incoming = number<double>(dloss);
    const Tensor dquery = at::empty({need_query ? p.n : 0, p.d}, operands),
                 dkey = at::empty({need_key ? p.m : 0, p.d}, operands);
    const auto side = [&](const Tensor& slopes, const Tensor& x, const Tensor& y, const A* inv, const A* inv_y,
                          const Tensor& dx, const Tensor& operand) {
      const int64_t others = y.size(0);
      DenseGradient<P> g{};
      g.rows = x.size(0), g.others = others, g.d = p.d, g.width = p.depth;
      g.depth = sizeof(P) == 2 ? whole_vectors(others) : others;
      g.slope = data<P>(slopes), g.lds = whole_vectors(others), g.operand = data<P>(operand), g.positive = data<A>(positive);
      g.x = data<P>(x), g.y = data<P>(y), g.inv = inv, g.inv_y = inv_y;
      g.factor = static_cast<A>(p.scale * incoming), g.dx = data<P>(dx), g.product = p.product;
      return g;
    };
    const Tensor none = at::empty({0}, operands);
    const Tensor k = need_query ? pack_rows<P>(features.key, kSmallCols) : none;
    const Tensor q = need_key ? pack_rows<P>(features.query, kSmallCols) : none;
    const auto rows = side(by_query, features.query, features.key, p.a, p.b, dquery, k);
    const auto cols = side(by_key, features.key, features.query, p.b, p.a, dkey, q);
    const int64_t row_blocks = need_query ? ceil_div(p.n, kSmallRows) : 0,
                  col_blocks = need_key ? ceil_div(p.m, kSmallRows) : 0;
    for_tasks(row_blocks + col_blocks, kSmallRows * p.depth * sizeof(A), [&](int64_t task, Scratch& scratch) {
      A* sums = scratch.take<A>(kSmallRows * p.depth);
      if (task < row_blocks) {
        VLMK_CALL(dense_gradient, rows, task, sums);
      } else {
        VLMK_CALL(dense_gradient, cols, task - row_blocks, sums);
      }
    });
    const auto scalar = [&](const optional<Tensor>& x, int64_t which, bool need) {
      if (!need) return at::empty({0}, x ? x->options() : scale.options());
      return at::full(x->sizes(), data<A>(dscalars)[which] * incoming, at::kDouble).to(x->scalar_type());
    };
    return std::make_tuple(as_given(dquery, query, need_query), as_given(dkey, key, need_key), scalar(scale, 0, needs[2]),
                           scalar(bias, 1, needs[3]));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) {
  m.impl("small_loss", &small_loss);
  m.impl("small_loss_bwd", &small_loss_bwd);
}

}  // namespace vlmk
