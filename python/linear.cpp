// vlmkernels::linear and _bwd for CPU tensors (contracts: vlmkernels/ops/linear.py).
#include <torch/library.h>

#include "dense.h"

namespace vlmk {

namespace {

std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias_,
                                  const optional<Tensor>& residual, c10::string_view name, bool keep) {
  const Need need("linear");
  const Activation activation = activation_of(need, name);
  need.tensor("x", x, {kLeading, kAny}, kFloats);
  need_layer(need, need.rows(x), "weight", weight, {kAny, x.size(-1)}, x.scalar_type(), "bias", bias_);
  need.tensor("residual", residual, with_last(x.sizes(), weight.size(0)), kFloats);
  const int64_t o = weight.size(0), k = weight.size(1), rows = rows_of(x);
  const auto dtype = residual ? c10::promoteTypes(x.scalar_type(), residual->scalar_type()) : x.scalar_type();
  const Tensor out = with_last(x, o, dtype), plus = residual ? residual->contiguous() : Tensor();
  const bool kept = keep && activation != Activation::none;
  const Tensor y = kept ? with_last(x, o, x.scalar_type()) : at::empty({0}, x.options());
  with_operand(x.scalar_type(), [&](auto type) {
    using P = decltype(type);
    const Tensor bias = widened<P>(bias_);
    ForwardWeight<P>(weight, rows)
        .apply(x.contiguous().view({rows, k}), {o, activation, data<acc_t<P>>(bias), stored(y), stored(plus), stored(out)});
  });
  return {out, y};
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(const Tensor& dout_, const optional<Tensor>& x, const Tensor& weight,
                                              const optional<Tensor>& bias, const optional<Tensor>& y_, c10::string_view name,
                                              std::array<bool, 3> needs) {
  const auto [need_x, need_weight, need_bias] = needs;
  const Need need("linear_bwd");
  const Activation activation = activation_of(need, name);
  need.tensor("dout", dout_, {kLeading, kAny}, kFloats);
  need_layer(need, need.rows(dout_), "weight", weight, {dout_.size(-1), kAny}, kFloats, "bias", bias);
  need.tensor("x", x, with_last(dout_.sizes(), weight.size(1)), weight.scalar_type());
  need.tensor("preactivation", y_, dout_.sizes(), weight.scalar_type());
  need.that(x || !need_weight, "the gradient of weight needs x");
  need.that(x || y_ || activation == Activation::none, "the activation needs x or its preactivation");
  const int64_t o = weight.size(0), k = weight.size(1), rows = rows_of(dout_);
  const Tensor dx = need_x ? with_last(dout_, k, weight.scalar_type()) : at::empty({0}, weight.options());
  const Tensor dweight = result(need_weight, weight.sizes(), weight), dbias = result(need_bias, {o}, weight);
  if (dout_.numel() == 0) return {dx.zero_(), dweight.zero_(), dbias.zero_()};
  const Tensor dout = dout_.contiguous().view({rows, o});
  Tensor y;
  if (activation != Activation::none) y = y_ ? y_->contiguous() : std::get<0>(linear(*x, weight, bias, {}, "none", false));
  with_operand(weight.scalar_type(), [&](auto type) {
    using P = decltype(type);
    const bool formed = activation != Activation::none && (need_x || need_weight);
    const Tensor g = formed ? buffer<P>(rows, o, dout) : Tensor();
    if (formed || need_bias) linear_slopes<acc_t<P>>(o, activation, dout, y, g, dbias);
    const Tensor& slope = formed ? g : dout;
    if (need_x) BackwardWeight<P>(weight, rows).apply(slope, {.k = k, .dx = stored(dx)});
    if (need_weight) WeightGradient<P>(dweight, rows).add(slope, x->contiguous().view({rows, k}));
  });
  return {dx, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) {
  m.impl("linear", &linear);
  m.impl("linear_bwd", &linear_bwd);
}

}  // namespace vlmk
