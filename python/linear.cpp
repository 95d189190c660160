// vlmkernels::linear and _bwd for CPU tensors (contracts: vlmkernels/ops/linear.py).
#include "linear.h"

#include <torch/library.h>

namespace vlmk {

Activation activation_of(std::string_view name) {
  constexpr std::string_view names[] = {"none", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "squared_relu"};
  for (int i = 0; i < 7; ++i) {
    if (name == names[i]) return static_cast<Activation>(i);
  }
  TORCH_CHECK(false, "unknown activation ", name);
}

namespace {

Tensor with_last(const Tensor& x, int64_t size, at::ScalarType dtype) {
  auto sizes = x.sizes().vec();
  sizes.back() = size;
  return on_huge_pages(at::empty(sizes, x.options().dtype(dtype)));
}

std::tuple<Tensor, Tensor> linear(const Tensor& x_, const Tensor& weight, const optional<Tensor>& bias_,
                                  const optional<Tensor>& residual_, c10::string_view name, bool keep) {
  TORCH_CHECK(x_.size(-1) == weight.size(1), "x and weight do not fit");
  const Activation activation = activation_of(name);
  const Tensor x = x_.contiguous(), residual = residual_ ? residual_->contiguous() : Tensor();
  const int64_t o = weight.size(0), k = weight.size(1);
  const auto dtype = residual_ ? c10::promoteTypes(x.scalar_type(), residual.scalar_type()) : x.scalar_type();
  const Tensor out = with_last(x, o, dtype);
  const bool kept = keep && activation != Activation::none;
  const Tensor y = kept ? with_last(x, o, x.scalar_type()) : at::empty({0}, x.options());
  if (out.numel() == 0) return {out, y};
  with_operand(x.scalar_type(), [&](auto type) {
    using P = decltype(type);
    using A = acc_t<P>;
    const Tensor bias = bias_ ? bias_->to(sum_type(scalar_type<P>())).contiguous() : Tensor();
    const LinearOutput<P> f{o, activation, bias.defined() ? data<A>(bias) : nullptr, stored(y), stored(residual), stored(out)};
    if (k > 0) return linear_forward<P>(x, weight, f);
    const Tensor zeros = at::zeros({out.numel() / o, o}, x.options());
    if (bias_) zeros.add_(*bias_);
    VLMK_CALL(linear_finish, f, stored(zeros), int64_t(0), zeros.size(0));
  });
  return {out, y};
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(const Tensor& dout_, const optional<Tensor>& x_, const Tensor& weight,
                                              const optional<Tensor>& bias, const optional<Tensor>& y_, c10::string_view name,
                                              bool need_x, bool need_weight, bool need_bias) {
  const Activation activation = activation_of(name);
  const int64_t o = weight.size(0), k = weight.size(1);
  const Tensor dout = dout_.contiguous();
  const Tensor dx = need_x ? with_last(dout, k, weight.scalar_type()) : at::empty({0}, weight.options());
  const Tensor dweight = result(need_weight, weight.sizes(), weight), dbias = result(need_bias, {o}, weight);
  if (dout.numel() == 0 || k == 0) {
    dx.zero_(), dweight.zero_();
    if (dout.numel() == 0) dbias.zero_();
    if (dout.numel() == 0 || !need_bias) return {dx, dweight, dbias};
  }
  Tensor y;
  if (activation != Activation::none) {
    y = y_ ? y_->contiguous() : std::get<0>(linear(*x_, weight, bias, {}, "none", false));
  }
  with_operand(weight.scalar_type(), [&](auto type) {
    using P = decltype(type);
    const bool formed = activation != Activation::none && (need_x || need_weight);
    const Tensor g = formed ? on_huge_pages(at::empty(dout.sizes(), dout.options().dtype(scalar_type<P>()))) : Tensor();
    if (formed || need_bias) linear_slopes<acc_t<P>>(o, activation, dout, y, g, dbias);
    if (k == 0) return;
    const Tensor& slope = formed ? g : dout;
    if (need_x) linear_input_gradient<P>(slope, weight, LinearInput<P>{k, stored(dx), Activation::none, {}, {}});
    if (need_weight) WeightGradient<P>(dweight, dout.numel() / o).add(slope, x_->contiguous());
  });
  return {dx, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) {
  m.impl("linear", &linear);
  m.impl("linear_bwd", &linear_bwd);
}

}  // namespace vlmk
