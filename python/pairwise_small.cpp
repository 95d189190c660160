// vlmkernels::small_loss, small_distillation and small_loss_bwd for CPU tensors (contracts: vlmkernels/ops/_pairwise_small.py).
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

// A problem with its memory, and the slopes with that of the results.
template <class P>
class Small {
  using A = acc_t<P>;

 public:
  Features<P> features;
  PairwiseSmall<P> g{};

  Small(const Tensor& query, const Tensor& key, const Tensor& scale, const optional<Tensor>& a, const optional<Tensor>& b,
        bool columns)
      : features(query, key, scale, a, b) {
    features.pack_kt(kSmallCols);
    g.pairs = features.pairs, g.columns = columns;
    g.ldx = whole_vectors(g.pairs.m), g.ldt = whole_vectors(g.pairs.n);
    Scratch measured{nullptr};
    share(measured);
    work_ = at::empty({reinterpret_cast<intptr_t>(measured.next)}, query.options().dtype(at::kByte));
    Scratch memory{data<char>(work_)};
    share(memory);
  }

  int64_t scratch(int64_t rows = kSmallRows) const { return rows * g.ldx; }

  void need(bool query, bool key, bool scalars, bool positives) {
    const auto operands = features.query.options();
    g.need_slopes = query || key || scalars, need_scalars_ = scalars;
    slope_ = at::empty({query ? g.pairs.n : 0, g.ldx}, operands);
    slope_t_ = at::empty({key ? g.pairs.m : 0, g.ldt}, operands);
    positive_ = at::empty({positives && g.need_slopes ? g.pairs.n : 0}, sums());
    g.slope = data<P>(slope_), g.slope_t = data<P>(slope_t_), g.positive = data<A>(positive_);
  }

  double total(const double* rows) const {
    double sum = 0;
    for (int64_t i = 0; i < g.pairs.n; ++i) sum += rows[i];
    return sum;
  }

  // loss, slope, slope_t, positive, dscalars
  auto results(double loss, at::ScalarType type, bool bias = false) const {
    const Tensor result = at::empty({}, sums()), dscalars = at::empty({need_scalars_ ? 2 : 0}, sums());
    *data<A>(result) = static_cast<A>(loss);
    if (need_scalars_) {
      data<A>(dscalars)[0] = static_cast<A>(total(g.dscale));
      data<A>(dscalars)[1] = bias ? static_cast<A>(total(g.dbias)) : A(0);
    }
    return std::make_tuple(result, slope_.to(type), slope_t_.to(type), positive_, dscalars);
  }

 private:
  Tensor work_, slope_, slope_t_, positive_;
  bool need_scalars_ = false;

  at::TensorOptions sums() const { return features.query.options().dtype(scalar_type<A>()); }

  void share(Scratch& memory) {
    const int64_t n = g.pairs.n, columns = g.columns ? g.pairs.m : 0, parts = g.row_blocks() * columns;
    g.x = memory.take<A>(n * g.ldx);
    for (A** each : {&g.diagonal, &g.row_max, &g.row_log, &g.row_sum}) *each = memory.take<A>(n);
    for (A** each : {&g.col_max, &g.col_log, &g.col_sum}) *each = memory.take<A>(columns);
    for (A** each : {&g.part_max, &g.part_sum, &g.part_total}) *each = memory.take<A>(parts);
    for (double** each : {&g.loss, &g.dscale, &g.dbias}) *each = memory.take<double>(n);
  }
};

void need_inputs(const Need& need, const Tensor& query, const Tensor& key, const Tensor& scale, const optional<Tensor>& bias) {
  need_features(need, query, key, scale);
  if (bias) need.scalar("bias", *bias);
  const int64_t n = query.size(0), m = key.size(0);
  need.that(n > 0 && m > 0, "query and key must have rows, got ", n, " and ", m);
}

void need_positives(const Need& need, const Tensor& query, const Tensor& key) {
  need.that(key.size(0) >= query.size(0), "key must have as many rows as query or more, got ", key.size(0), " and ",
            query.size(0));
}

auto small_loss(const Tensor& query, const Tensor& key, const Tensor& scale, const optional<Tensor>& bias, bool symmetric,
                double smoothing, bool normalize, bool need_query, bool need_key, bool need_scalars) {
  const Need need(bias ? "sigmoid_loss (small_loss)" : "info_nce (small_loss)");
  need_inputs(need, query, key, scale, bias);
  need_positives(need, query, key);
  need.that(!symmetric || query.size(0) == key.size(0), "a symmetric loss needs as many keys as queries, got ", key.size(0),
            " and ", query.size(0));
  return with_operand(query.scalar_type(), [&](auto type) {
    using P = decltype(type);
    using A = acc_t<P>;
    Small<P> small(query, key, scale, inverse_norms(query, normalize), inverse_norms(key, normalize), symmetric);
    small.need(need_query, need_key, need_scalars, true);
    PairwiseSmall<P>& g = small.g;
    g.bias = bias ? number<A>(*bias) : A(0), g.smoothing = static_cast<A>(smoothing);
    const int64_t blocks = g.row_blocks(), scratch_bytes = small.scratch() * sizeof(A);
    double columns = 0;
    if (bias) {
      for_tasks(blocks, scratch_bytes,
                [&](int64_t ib, Scratch& scratch) { VLMK_CALL(small_logistic, g, ib, scratch.take<A>(small.scratch())); });
    } else {
      for_tasks(blocks, 0, [&](int64_t ib, Scratch&) { VLMK_CALL(small_cross_entropy_rows, g, ib); });
      if (symmetric) columns = VLMK_CALL(small_cross_entropy_columns, g);
      if (g.need_slopes) {
        for_tasks(blocks, scratch_bytes, [&](int64_t ib, Scratch& scratch) {
          VLMK_CALL(small_cross_entropy_slopes, g, ib, scratch.take<A>(small.scratch()));
        });
      }
    }
    const double loss = (symmetric ? 0.5 : 1.0) * (small.total(g.loss) / g.pairs.n + columns / g.pairs.m);
    return small.results(loss, slope_type(query), bias.has_value());
  });
}

auto small_distillation(const Tensor& query, const Tensor& key, const Tensor& scale, const Tensor& teacher_query,
                        const Tensor& teacher_key, const Tensor& teacher_scale, bool symmetric, bool cross_entropy, bool mean,
                        bool need_query, bool need_key, bool need_scalars) {
  const Need need("contrastive_distillation (small_distillation)");
  need_inputs(need, query, key, scale, {});
  need_teacher(need, query, key, teacher_query, teacher_key, teacher_scale);
  return with_operand(query.scalar_type(), [&](auto type) {
    using P = decltype(type);
    using A = acc_t<P>;
    Small<P> student(query, key, scale, {}, {}, symmetric);
    const Small<P> teacher(teacher_query, teacher_key, teacher_scale, {}, {}, symmetric);
    student.need(need_query, need_key, need_scalars, false);
    const double share = symmetric ? 0.5 : 1.0;
    const auto weight = [&](int64_t count) { return static_cast<A>(mean ? share / count : share); };
    const SmallDistillation<P> g{student.g, teacher.g, cross_entropy, weight(student.g.pairs.n), weight(student.g.pairs.m)};
    const int64_t blocks = g.student.row_blocks();
    for_tasks(2 * blocks, 0,
              [&](int64_t task, Scratch&) { VLMK_CALL(small_log_sum_exps_rows, task % 2 ? g.teacher : g.student, task / 2); });
    if (symmetric) {
      VLMK_CALL(small_log_sum_exps_columns, g.student);
      VLMK_CALL(small_log_sum_exps_columns, g.teacher);
    }
    const int64_t scratch_size = student.scratch(kSmallRows + 2);
    for_tasks(blocks, scratch_size * sizeof(A),
              [&](int64_t ib, Scratch& scratch) { VLMK_CALL(small_distillation, g, ib, scratch.take<A>(scratch_size)); });
    return student.results(student.total(g.student.loss), slope_type(query));
  });
}

auto small_loss_bwd(const Tensor& dloss, const Tensor& query, const Tensor& key, const Tensor& scale,
                    const optional<Tensor>& bias, const Tensor& slope, const Tensor& slope_t, const Tensor& positive,
                    const Tensor& dscalars, bool normalize, std::array<bool, 4> needs) {
  const Need need("small_loss_bwd");
  need_inputs(need, query, key, scale, bias);
  const int64_t n = query.size(0), m = key.size(0);
  const auto sums = sum_type(query.scalar_type());
  need.scalar("dloss", dloss);
  if (needs[0]) need.contiguous("slope", slope, {n, whole_vectors(m)}, slope_type(query));
  if (needs[1]) need.contiguous("slope_t", slope_t, {m, whole_vectors(n)}, slope_type(query));
  const bool positives = positive.numel() > 0;
  if (positives) need_positives(need, query, key);
  if (needs[0] || needs[1]) need.contiguous("positive", positive, positives ? n : 0, sums);
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
  m.impl("small_distillation", &small_distillation);
  m.impl("small_loss", &small_loss);
  m.impl("small_loss_bwd", &small_loss_bwd);
}

}  // namespace vlmk
