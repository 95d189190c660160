// vlmkernels::gated_linear_residual and _bwd for CPU tensors (contracts: vlmkernels/ops/gated_linear_residual.py).
#include "vlmkernels/gated_linear_residual.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <type_traits>

#include "dense.h"

namespace vlmk {
namespace {

using at::Tensor;
using std::optional;

// f(operand type, type of x, h and the results) for a result of dtype `out` and operands of dtype `in`.
template <class F>
void with_types(at::ScalarType out, at::ScalarType in, F f) {
  const bool narrow = in == at::kBFloat16 && tile_product<bf16>();
  if (out == at::kDouble) return f(double(), double());
  if (out == at::kFloat) return narrow ? f(bf16(), float()) : f(float(), float());
  if (out == at::kBFloat16) return narrow ? f(bf16(), bf16()) : f(float(), bf16());
  if (out != at::kHalf) no_kernel(out);
  f(float(), f16());
}

// tanh(gate) for each of d channels.
Tensor gates(const Tensor& gate, int64_t d, at::ScalarType type) {
  return gate.to(type).reshape({-1}).tanh().expand({d}).contiguous();
}

// Which rows the mask keeps.
struct Kept {
  Kept(const optional<Tensor>& mask, int64_t all) : rows(all) {
    if (!mask) return;
    list = at::nonzero(mask->reshape({-1})).reshape({-1});
    rows = list.size(0);
    if (rows < all) index = static_cast<const int64_t*>(list.data_ptr());
    flags = mask->contiguous();
  }
  // Calls f(row) for the rows that the mask does not keep.
  template <class F>
  void for_others(int64_t all, F f) const {
    if (rows == all) return;
    const bool* keep = data<bool>(flags);
    at::parallel_for(0, all, 256, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        if (!keep[r]) f(r);
      }
    });
  }
  int64_t rows;
  const int64_t* index = nullptr;
  Tensor list, flags;
};

// x: the residual stream, or the gradient of the result.
void need_operands(const Need& need, const char* name, const Tensor& x, const Tensor& h, const Tensor& weight,
                   const Tensor& gate, const optional<Tensor>& row_mask) {
  need.tensor("h", h, {kLeading, kAny}, kFloats);
  const int64_t k = h.size(-1);
  need.tensor("weight", weight, {kAny, k}, h.scalar_type());
  const int64_t d = weight.size(0);
  need.tensor(name, x, with_last(h.sizes(), d), kFloats);
  need.gate("gate", gate, d);
  need.tensor("row_mask", row_mask, h.sizes().slice(0, h.dim() - 1), at::kBool);
  const int64_t rows = need.rows(h);
  need.countable({rows, d});
  need.countable({rows, k});
  need.countable({d, k});
}

Tensor gated_linear_residual(const Tensor& x_, const Tensor& h, const Tensor& weight, const Tensor& gate,
                             const optional<Tensor>& row_mask) {
  need_operands(Need("gated_linear_residual"), "x", x_, h, weight, gate, row_mask);
  const auto dtype = c10::promoteTypes(x_.scalar_type(), h.scalar_type());
  const Tensor x = x_.to(dtype).contiguous(), out = on_huge_pages(at::empty(x.sizes(), x.options()));
  if (x.numel() == 0) return out;
  if (h.numel() == 0) return out.copy_(x);
  const int64_t d = x.size(-1), rows = x.numel() / d;
  const Kept kept(row_mask, rows);
  const int64_t row_bytes = d * x.element_size();
  kept.for_others(rows,
                  [&](int64_t r) { std::memcpy(data<char>(out) + r * row_bytes, data<char>(x) + r * row_bytes, row_bytes); });
  if (kept.rows == 0) return out;
  const Tensor t = gates(gate, d, sum_type(dtype));
  with_types(dtype, h.scalar_type(), [&](auto p, auto) {
    using P = decltype(p);
    ForwardTiles<P>(weight, kept.rows)
        .apply(h, kept.rows, {.o = d, .residual = stored(x), .out = stored(out), .t = data<acc_t<P>>(t), .index = kept.index});
  });
  return out;
}

// dh; <dout weight, h> where asked for.
template <class P, class T>
double input_gradient(const Tensor& dout, const Tensor& h, const Tensor& weight, const Tensor& t, bool vector, bool dot,
                      const Kept& kept, const Tensor& dh) {
  using A = acc_t<P>;
  const int64_t k = weight.size(1), blocks = ceil_div(kept.rows, kBlockRows<P>) * ceil_div(k, kBlockCols<P>);
  const Tensor dots = at::empty({dot ? blocks : 0}, weight.options().dtype(at::kDouble));
  const GatedLinearInput<P, T> g{k,           kept.index,        vector ? A(1) : data<A>(t)[0], dot ? data<T>(h) : nullptr,
                                 data<T>(dh), data<double>(dots)};
  BackwardTiles<P>(weight, kept.rows, vector ? data<A>(t) : nullptr)
      .apply(dout, kept.index, kept.rows, [&](const BlockProduct<P>& p, int64_t row, int64_t count) {
        VLMK_CALL(gated_linear_residual_dh, p, g, row, count);
      });
  double total = 0;
  for (int64_t i = 0; i < dots.numel(); ++i) total += data<double>(dots)[i];
  return total;
}

// dweight, and sum_k (dout^T h) * weight for each channel where asked for.
template <class P, class T>
void weight_gradient(const Tensor& dout, const Tensor& h, const Tensor& weight, const Tensor& t, const Kept& kept,
                     const Tensor& dweight, const Tensor& total) {
  using A = acc_t<P>;
  const int64_t d = weight.size(0), k = weight.size(1), rows = kept.rows;
  WeightTiles<P> tiles(d, k, rows, weight.options());
  const bool in_place = std::is_same_v<T, A> && dweight.numel();
  const Tensor products = in_place ? dweight : at::empty({rows > kChunkRows ? d : 0, k}, t.options());
  const Tensor part = at::empty({total.defined() ? tiles.col_blocks() : 0, d}, t.options());
  const GatedLinearWeight<P, T> g{d,
                                  k,
                                  data<A>(t),
                                  total.defined() ? data<T>(weight) : nullptr,
                                  data<A>(on_huge_pages(products)),
                                  data<T>(dweight),
                                  data<A>(part)};
  tiles.add(dout, h, kept.index, rows, [&](const BlockProduct<P>& p, int64_t d0, int64_t count, bool add, bool finish) {
    VLMK_CALL(gated_linear_residual_dw, p, g, d0, count, add, finish);
  });
  const A* from = data<A>(part);
  double* to = data<double>(total);
  for (int64_t block = 0; to && block < tiles.col_blocks(); ++block) {
    for (int64_t c = 0; c < d; ++c) to[c] += from[block * d + c];
  }
}

std::tuple<Tensor, Tensor, Tensor> gated_linear_residual_bwd(const Tensor& dout, const Tensor& h_, const Tensor& weight_,
                                                             const Tensor& gate, const optional<Tensor>& row_mask,
                                                             std::array<bool, 3> needs) {
  const auto [need_h, need_weight, need_gate] = needs;
  need_operands(Need("gated_linear_residual_bwd"), "dout", dout, h_, weight_, gate, row_mask);
  const auto dtype = c10::promoteTypes(dout.scalar_type(), h_.scalar_type()), in = h_.scalar_type();
  const auto storage = dtype == at::kDouble ? at::kDouble : in;  // of h, weight and their gradients
  const Tensor h = h_.to(storage).contiguous(), weight = weight_.to(storage).contiguous();
  const int64_t d = weight.size(0), k = weight.size(1), rows = k ? h.numel() / k : 0;
  const Tensor dh = on_huge_pages(at::empty(need_h ? h.sizes() : at::IntArrayRef{0}, h.options()));
  const Tensor dweight = on_huge_pages(at::empty(need_weight ? weight.sizes() : at::IntArrayRef{0}, weight.options()));
  const Tensor t = gates(gate, d, sum_type(dtype));
  const bool vector = gate.numel() == d && d > 1, dot = need_gate && need_h && !vector;
  Tensor total = at::zeros({need_gate ? gate.numel() : 0}, gate.options().dtype(at::kDouble));
  const Kept kept(row_mask, rows);
  if (kept.rows == 0 || d == 0 || k == 0) {
    dh.zero_();
    dweight.zero_();
  } else {
    if (need_h) {
      const int64_t row_bytes = k * dh.element_size();
      kept.for_others(rows, [&](int64_t r) { std::memset(data<char>(dh) + r * row_bytes, 0, row_bytes); });
    }
    with_types(storage, in, [&](auto p, auto type) {
      using P = decltype(p);
      using T = decltype(type);
      if (need_h) {
        const double sum = input_gradient<P, T>(dout, h, weight, t, vector, dot, kept, dh);
        if (dot) data<double>(total)[0] = sum;
      }
      if (!need_weight && (!need_gate || dot)) return;
      const Tensor channels = need_gate && !dot ? at::zeros({d}, total.options()) : Tensor();
      weight_gradient<P, T>(dout, h, weight, t, kept, dweight, channels);
      const double* from = data<double>(channels);
      double* to = data<double>(total);
      for (int64_t c = 0; from && c < d; ++c) to[vector ? c : 0] += from[c];
    });
  }
  if (!need_gate) return {dh.to(in), dweight.to(in), at::empty({0}, gate.options())};
  const Tensor slope = gate.to(at::kDouble).reshape({-1}).tanh();
  return {dh.to(in), dweight.to(in), ((1 - slope * slope) * total).to(gate.scalar_type()).reshape(gate.sizes())};
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) {
  m.impl("gated_linear_residual", &gated_linear_residual);
  m.impl("gated_linear_residual_bwd", &gated_linear_residual_bwd);
}

}  // namespace vlmk
