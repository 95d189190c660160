// vlmkernels::gated_mlp and _bwd for CPU tensors (contracts: vlmkernels/ops/gated_mlp.py).
#include <torch/library.h>

#include <array>

#include "dense.h"

namespace vlmk {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor, Tensor> gated_mlp(const Tensor& x_, const Tensor& w_gate, const Tensor& w_up, const Tensor& w_down,
                                             const optional<Tensor>& b_gate_, const optional<Tensor>& b_up_,
                                             const optional<Tensor>& b_down_, const optional<Tensor>& residual_,
                                             c10::string_view name, bool keep) {
  const Need need("gated_mlp");
  const Activation activation = activation_of(need, name);
  need.tensor("x", x_, {kLeading, kAny}, kFloats);
  need_layer(need, need.rows(x_), "w_gate", w_gate, {kAny, x_.size(-1)}, x_.scalar_type(), "b_gate", b_gate_);
  need_layer(need, need.rows(x_), "w_up", w_up, w_gate.sizes(), x_.scalar_type(), "b_up", b_up_);
  need_layer(need, need.rows(x_), "w_down", w_down, {kAny, w_gate.size(0)}, x_.scalar_type(), "b_down", b_down_);
  need.tensor("residual", residual_, with_last(x_.sizes(), w_down.size(0)), kFloats);
  const int64_t h = w_gate.size(0), k = w_gate.size(1), o = w_down.size(0), rows = rows_of(x_);
  const auto dtype = residual_ ? c10::promoteTypes(x_.scalar_type(), residual_->scalar_type()) : x_.scalar_type();
  const auto kept = [&] { return keep ? with_last(x_, h, x_.scalar_type()) : at::empty({0}, x_.options()); };
  const Tensor out = with_last(x_, o, dtype), gate = kept(), up = kept();
  const Tensor x = x_.contiguous().view({rows, k}), flat = out.view({rows, o});
  const Tensor gates = keep ? gate.view({rows, h}) : gate, ups = keep ? up.view({rows, h}) : up;
  const Tensor residual = residual_ ? residual_->contiguous().view({rows, o}) : Tensor();
  with_operand(x.scalar_type(), [&](auto type) {
    using P = decltype(type);
    using A = acc_t<P>;
    const Tensor b_gate = widened<P>(b_gate_), b_up = widened<P>(b_up_), b_down = widened<P>(b_down_);
    const ForwardWeight<P> by_gate(w_gate, rows), by_up(w_up, rows), down(w_down, rows);
    const int64_t most = std::min(rows, kHiddenRows);
    const Tensor hidden = buffer<P>(most, h, x), sums = buffer<A>(most, h, x);
    for (int64_t begin = 0; begin < rows; begin += kHiddenRows) {
      const int64_t count = std::min(kHiddenRows, rows - begin);
      const auto here = [&](const Tensor& t) { return part(t, begin, count); };
      const Tensor now = part(hidden, 0, count), exact = part(sums, 0, count);  // the gate is not rounded before it is used
      by_gate.apply(here(x), {.o = h, .bias = data<A>(b_gate), .y = stored(here(gates)), .out = stored(exact)});
      by_up.apply(here(x), {.o = h,
                            .activation = activation,
                            .bias = data<A>(b_up),
                            .y = stored(here(ups)),
                            .out = stored(now),
                            .gate = stored(exact)});
      down.apply(now, {.o = o, .bias = data<A>(b_down), .residual = stored(here(residual)), .out = stored(here(flat))});
    }
  });
  return {out, gate, up};
}

Results gated_mlp_bwd(const Tensor& dout_, const optional<Tensor>& x_, const Tensor& w_gate, const Tensor& w_up,
                      const Tensor& w_down, const optional<Tensor>& b_gate_, const optional<Tensor>& b_up_,
                      const optional<Tensor>& gate_, const optional<Tensor>& up_, c10::string_view name,
                      std::array<bool, 7> needs) {
  const Need need("gated_mlp_bwd");
  const Activation activation = activation_of(need, name);
  need.tensor("dout", dout_, {kLeading, kAny}, kFloats);
  need_layer(need, need.rows(dout_), "w_down", w_down, {dout_.size(-1), kAny}, kFloats, "b_down", std::nullopt);
  need_layer(need, need.rows(dout_), "w_gate", w_gate, {w_down.size(1), kAny}, w_down.scalar_type(), "b_gate", b_gate_);
  need_layer(need, need.rows(dout_), "w_up", w_up, w_gate.sizes(), w_down.scalar_type(), "b_up", b_up_);
  need.tensor("x", x_, with_last(dout_.sizes(), w_gate.size(1)), w_gate.scalar_type());
  need.tensor("gate", gate_, with_last(dout_.sizes(), w_gate.size(0)), w_gate.scalar_type());
  need.tensor("up", up_, with_last(dout_.sizes(), w_gate.size(0)), w_gate.scalar_type());
  need.that(x_ || !(needs[1] || needs[2]), "the gradients of w_gate and w_up need x");
  need.that(x_ || (gate_ && up_), "x, or both gate and up, must be given");
  const int64_t h = w_gate.size(0), k = w_gate.size(1), o = w_down.size(0), rows = rows_of(dout_);
  const auto [need_x, need_w_gate, need_w_up, need_w_down, need_b_gate, need_b_up, need_b_down] = needs;
  const Tensor dx = need_x ? with_last(dout_, k, w_gate.scalar_type()) : at::empty({0}, w_gate.options());
  const Tensor dw_gate = result(need_w_gate, w_gate.sizes(), w_gate), dw_up = result(need_w_up, w_up.sizes(), w_up),
               dw_down = result(need_w_down, w_down.sizes(), w_down), db_gate = result(need_b_gate, {h}, w_gate),
               db_up = result(need_b_up, {h}, w_up), db_down = result(need_b_down, {o}, w_down);
  const Results results{dx, dw_gate, dw_up, dw_down, db_gate, db_up, db_down};
  if (dout_.numel() == 0) {
    for (const Tensor& t : {dx, dw_gate, dw_up, dw_down, db_gate, db_up, db_down}) t.zero_();
    return results;
  }
  if (h == 0) dx.zero_();
  const bool below = need_x || need_w_gate || need_w_up || need_b_gate || need_b_up;
  const Tensor dout = dout_.contiguous().view({rows, o}), x = x_ ? x_->contiguous().view({rows, k}) : Tensor();
  const Tensor dx_rows = need_x ? dx.view({rows, k}) : dx;
  const bool kept = gate_ && up_;
  with_operand(w_gate.scalar_type(), [&](auto type) {
    using P = decltype(type);
    using A = acc_t<P>;
    if (need_b_down) linear_slopes<A>(o, Activation::none, dout, {}, {}, db_down);
    if ((!below && !need_w_down) || h == 0) return;
    const int64_t most = std::min(rows, kChunkRows);
    const Tensor gates = kept ? gate_->contiguous().view({rows, h}) : buffer<A>(most, h, w_gate),
                 ups = kept ? up_->contiguous().view({rows, h}) : buffer<A>(most, h, w_gate);
    const Tensor b_gate = widened<P>(b_gate_), b_up = widened<P>(b_up_);
    const Tensor hidden = need_w_down ? buffer<P>(most, h, w_gate) : Tensor(),
                 sums = need_x ? buffer<A>(most, k, w_gate) : Tensor();
    const Tensor dgate = below ? buffer<P>(most, h, w_gate) : Tensor(), dup = below ? buffer<P>(most, h, w_gate) : Tensor();
    optional<ForwardWeight<P>> form_gate, form_up;
    optional<BackwardWeight<P>> down, up, gate;
    optional<WeightGradient<P>> by_gate, by_up, by_down;
    if (!kept) form_gate.emplace(w_gate, rows), form_up.emplace(w_up, rows);
    if (below) down.emplace(w_down, rows);
    if (need_x) gate.emplace(w_gate, rows), up.emplace(w_up, rows);
    if (need_w_gate) by_gate.emplace(dw_gate, rows);
    if (need_w_up) by_up.emplace(dw_up, rows);
    if (need_w_down) by_down.emplace(dw_down, rows);
    ColumnSums<A> by_b_gate(db_gate), by_b_up(db_up);
    for (int64_t begin = 0; begin < rows; begin += kChunkRows) {
      const int64_t count = std::min(kChunkRows, rows - begin);
      const auto here = [&](const Tensor& t) { return part(t, begin, count); };
      const auto now = [&](const Tensor& t) { return part(t, 0, count); };
      if (!kept) {
        form_gate->apply(here(x), {.o = h, .bias = data<A>(b_gate), .out = stored(now(gates))});
        form_up->apply(here(x), {.o = h, .bias = data<A>(b_up), .out = stored(now(ups))});
      }
      const Tensor g = kept ? here(gates) : now(gates), u = kept ? here(ups) : now(ups);
      if (below) {
        down->apply(here(dout), {.k = h,
                                 .dx = stored(now(dgate)),
                                 .activation = activation,
                                 .y = stored(g),
                                 .hidden = stored(now(hidden)),
                                 .up = stored(u),
                                 .dup = stored(now(dup))});
      } else {
        finish_rows<P>(u, {.o = h, .activation = activation, .out = stored(now(hidden)), .gate = stored(g)});
      }
      if (need_w_down) by_down->add(here(dout), now(hidden));
      if (need_w_gate) by_gate->add(now(dgate), here(x));
      if (need_w_up) by_up->add(now(dup), here(x));
      if (need_b_gate) by_b_gate.add(now(dgate));
      if (need_b_up) by_b_up.add(now(dup));
      if (!need_x) continue;
      gate->apply(now(dgate), {.k = k, .dx = stored(now(sums))});
      up->apply(now(dup), {.k = k, .dx = stored(here(dx_rows)), .plus = stored(now(sums))});
    }
  });
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) {
  m.impl("gated_mlp", &gated_mlp);
  m.impl("gated_mlp_bwd", &gated_mlp_bwd);
}

}  // namespace vlmk
