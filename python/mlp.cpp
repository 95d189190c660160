// vlmkernels::mlp and _bwd for CPU tensors (contracts: vlmkernels/ops/mlp.py).
#include <torch/library.h>

#include <array>

#include "dense.h"

namespace vlmk {
namespace {

std::tuple<Tensor, Tensor> mlp(const Tensor& x_, const Tensor& w1, const optional<Tensor>& b1_, const Tensor& w2,
                               const optional<Tensor>& b2_, const optional<Tensor>& residual_, c10::string_view name,
                               bool keep) {
  const Need need("mlp");
  const Activation activation = activation_of(need, name);
  need.tensor("x", x_, {kLeading, kAny}, kFloats);
  need_layer(need, need.rows(x_), "w1", w1, {kAny, x_.size(-1)}, x_.scalar_type(), "b1", b1_);
  need_layer(need, need.rows(x_), "w2", w2, {kAny, w1.size(0)}, x_.scalar_type(), "b2", b2_);
  need.tensor("residual", residual_, with_last(x_.sizes(), w2.size(0)), kFloats);
  const int64_t h = w1.size(0), k = w1.size(1), o = w2.size(0);
  const auto dtype = residual_ ? c10::promoteTypes(x_.scalar_type(), residual_->scalar_type()) : x_.scalar_type();
  const Tensor out = with_last(x_, o, dtype), y = keep ? with_last(x_, h, x_.scalar_type()) : at::empty({0}, x_.options());
  const int64_t rows = rows_of(x_);
  const Tensor x = x_.contiguous().view({rows, k}), flat = out.view({rows, o}), pre = keep ? y.view({rows, h}) : y;
  const Tensor residual = residual_ ? residual_->contiguous().view({rows, o}) : Tensor();
  with_operand(x.scalar_type(), [&](auto type) {
    using P = decltype(type);
    const Tensor b1 = widened<P>(b1_), b2 = widened<P>(b2_);
    const ForwardWeight<P> first(w1, rows), second(w2, rows);
    const Tensor hidden = buffer<P>(std::min(rows, kHiddenRows), h, x);
    for (int64_t begin = 0; begin < rows; begin += kHiddenRows) {
      const int64_t count = std::min(kHiddenRows, rows - begin);
      const auto here = [&](const Tensor& t) { return part(t, begin, count); };
      const Tensor now = part(hidden, 0, count);
      first.apply(here(x), {h, activation, data<acc_t<P>>(b1), stored(here(pre)), {}, stored(now)});
      second.apply(now, {o, Activation::none, data<acc_t<P>>(b2), {}, stored(here(residual)), stored(here(flat))});
    }
  });
  return {out, y};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_bwd(const Tensor& dout_, const optional<Tensor>& x_, const Tensor& w1,
                                                           const optional<Tensor>& b1_, const Tensor& w2,
                                                           const optional<Tensor>& y_, c10::string_view name,
                                                           std::array<bool, 5> needs) {
  const Need need("mlp_bwd");
  const Activation activation = activation_of(need, name);
  need.tensor("dout", dout_, {kLeading, kAny}, kFloats);
  need_layer(need, need.rows(dout_), "w2", w2, {dout_.size(-1), kAny}, kFloats, "b2", std::nullopt);
  need_layer(need, need.rows(dout_), "w1", w1, {w2.size(1), kAny}, w2.scalar_type(), "b1", b1_);
  need.tensor("x", x_, with_last(dout_.sizes(), w1.size(1)), w1.scalar_type());
  need.tensor("preactivation", y_, with_last(dout_.sizes(), w1.size(0)), w1.scalar_type());
  need.that(x_ || !needs[1], "the gradient of w1 needs x");
  need.that(x_ || y_, "one of x and preactivation must be given");
  const int64_t h = w1.size(0), k = w1.size(1), o = w2.size(0), rows = rows_of(dout_);
  const Tensor dout = dout_.contiguous().view({rows, o}), x = x_ ? x_->contiguous().view({rows, k}) : Tensor();
  const bool need_x = needs[0], need_w1 = needs[1], need_b1 = needs[2], need_w2 = needs[3];
  const Tensor dx = need_x ? with_last(dout_, k, w1.scalar_type()) : at::empty({0}, w1.options());
  const Tensor dw1 = result(need_w1, w1.sizes(), w1), db1 = result(need_b1, {h}, w1), dw2 = result(need_w2, w2.sizes(), w2),
               db2 = result(needs[4], {o}, w2);
  const Tensor dx_rows = need_x ? dx.view({rows, k}) : dx;
  if (dout_.numel() == 0) return {dx.zero_(), dw1.zero_(), db1.zero_(), dw2.zero_(), db2.zero_()};
  if (h == 0) dx.zero_();
  const bool slope = need_x || need_w1 || need_b1;
  with_operand(w1.scalar_type(), [&](auto type) {
    using P = decltype(type);
    using A = acc_t<P>;
    if (needs[4]) linear_slopes<A>(o, Activation::none, dout, {}, {}, db2);
    if ((!slope && !need_w2) || h == 0) return;
    const int64_t most = std::min(rows, kChunkRows);
    const Tensor y = y_ ? y_->contiguous().view({rows, h}) : Tensor(), b1 = widened<P>(b1_);
    const Tensor again = y_ ? Tensor() : at::empty({most, h}, w1.options());
    const Tensor hidden = need_w2 ? buffer<P>(most, h, w1) : Tensor(), dy = slope ? buffer<P>(most, h, w1) : Tensor();
    optional<ForwardWeight<P>> form;
    optional<BackwardWeight<P>> first, second;
    optional<WeightGradient<P>> by_w1, by_w2;
    if (!y_) form.emplace(w1, rows);
    if (slope) second.emplace(w2, rows);
    if (need_x) first.emplace(w1, rows);
    if (need_w1) by_w1.emplace(dw1, rows);
    if (need_w2) by_w2.emplace(dw2, rows);
    ColumnSums<A> by_b1(db1);
    for (int64_t begin = 0; begin < rows; begin += kChunkRows) {
      const int64_t count = std::min(kChunkRows, rows - begin);
      const auto here = [&](const Tensor& t) { return part(t, begin, count); };
      const auto now = [&](const Tensor& t) { return part(t, 0, count); };
      if (!y_) form->apply(here(x), {.o = h, .bias = data<A>(b1), .out = stored(now(again))});
      const Tensor pre = y_ ? here(y) : now(again);
      if (slope) {
        second->apply(
            here(dout),
            {.k = h, .dx = stored(now(dy)), .activation = activation, .y = stored(pre), .hidden = stored(now(hidden))});
      } else {
        finish_rows<P>(pre, {.o = h, .activation = activation, .out = stored(now(hidden))});
      }
      if (need_w2) by_w2->add(here(dout), now(hidden));
      if (need_w1) by_w1->add(now(dy), here(x));
      if (need_b1) by_b1.add(now(dy));
      if (need_x) first->apply(now(dy), {.k = k, .dx = stored(here(dx_rows))});
    }
  });
  return {dx, dw1, db1, dw2, db2};
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) {
  m.impl("mlp", &mlp);
  m.impl("mlp_bwd", &mlp_bwd);
}

}  // namespace vlmk
