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

template <class P, class T>
void forward(const Tensor& h_, const Tensor& weight_, const Tensor& x, const Tensor& gate, const Kept& kept,
             const Tensor& out) {
  using A = acc_t<P>;
  const int64_t d = weight_.size(0), k = weight_.size(1), depth = depth_of<P>(k), rows = kept.rows;
  const Operand<P> h(h_, k, depth, kept.index), w(weight_.to(scalar_type<P>()), k, depth, nullptr);
  const Tensor t = gates(gate, d, sum_type(scalar_type<P>()));
  const GatedLinear<P, T> g{d, kept.index, data<A>(t), data<T>(x), data<T>(out)};
  if (rows == 1 && sizeof(P) > 2) {
    Scratch scratch(h.bytes(1));
    const P* row = h.rows(0, 1, 1, scratch);
    at::parallel_for(0, d, std::max<int64_t>(64, (1 << 17) / k), [&](int64_t begin, int64_t end) {
      VLMK_CALL(gated_linear_residual_row, g, row, int64_t(0), data<P>(w.tensor) + begin * k, k, begin, end - begin);
    });
    return;
  }
  if (rows * (d + k) < d * k) {  // packing h and turning the tiles costs less than packing the weight
    const int64_t width = std::min<int64_t>(64, round_up(rows, 16)), blocks = ceil_div(rows, width);
    const Tensor ht = at::empty({blocks * depth * width}, w.tensor.options());
    for_tasks(blocks, h.bytes(width), [&](int64_t block, Scratch& scratch) {
      const int64_t row = block * width, count = std::min(width, rows - row);
      VLMK_CALL(pack_transposed_b, h.rows(row, count, count, scratch), depth, count, depth, depth, width,
                data<P>(ht) + row * depth);
    });
    const Split<P> split(d, rows, width);
    for_tasks(split.tasks(), w.bytes(kBlockRows<P>) + split.bytes(width) + kBlockRows<P> * width * sizeof(A) + 64,
              [&](int64_t task, Scratch& scratch) {
                const int64_t d0 = split.row(task), count = split.count(task);
                auto p = split.take(task, count, depth, width, scratch);
                p.a = w.rows(d0, count, count, scratch), p.b = data<P>(ht);
                VLMK_CALL(gated_linear_residual_few, p, g, d0, count, rows, scratch.take<A>(width * count));
              });
    return;
  }
  constexpr int64_t width = kBlockCols<P>;
  const Split<P> split(rows, d, width);
  const Tensor wt = on_huge_pages(at::empty({split.col_blocks * depth * width}, w.tensor.options()));
  for_tasks(split.col_blocks, 0, [&](int64_t block, Scratch&) {
    const int64_t d0 = block * width;
    VLMK_CALL(pack_transposed_b, data<P>(w.tensor) + d0 * k, k, std::min(width, d - d0), k, depth, width,
              data<P>(wt) + d0 * depth);
  });
  for_tasks(split.tasks(), h.bytes(kBlockRows<P>) + split.bytes(width), [&](int64_t task, Scratch& scratch) {
    const int64_t row = split.row(task), count = split.count(task), padded = round_up(count, 32);
    auto p = split.take(task, padded, depth, width, scratch);
    p.a = h.rows(row, count, padded, scratch), p.b = data<P>(wt);
    VLMK_CALL(gated_linear_residual, p, g, row, count);
  });
}

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
  with_types(dtype, h.scalar_type(),
             [&](auto p, auto type) { forward<decltype(p), decltype(type)>(h, weight, x, gate, kept, out); });
  return out;
}

// dh; <dout weight, h> where asked for.
template <class P, class T>
double input_gradient(const Tensor& dout_, const Tensor& h, const Tensor& weight_, const Tensor& t, bool vector, bool dot,
                      const Kept& kept, const Tensor& dh) {
  using A = acc_t<P>;
  constexpr int64_t width = kBlockCols<P>;
  const int64_t d = weight_.size(0), k = weight_.size(1), depth = depth_of<P>(d);
  const Tensor weight = weight_.to(scalar_type<P>()).contiguous();
  const Operand<P> dout(dout_, d, depth, kept.index);
  const Split<P> split(kept.rows, k, width);
  const bool packed = sizeof(P) == 2 || vector || kept.rows > kFewRows;
  const Tensor w = on_huge_pages(at::empty({packed ? split.col_blocks * depth * width : 0}, weight.options()));
  for_tasks(packed ? split.col_blocks : 0, 0, [&](int64_t block, Scratch&) {
    const int64_t k0 = block * width;
    VLMK_CALL(pack_columns_b, data<P>(weight) + k0, k, vector ? data<A>(t) : nullptr, std::min(width, k - k0), d, depth,
              data<P>(w) + k0 * depth);
  });
  const Tensor dots = at::empty({dot ? split.row_blocks * split.col_blocks : 0}, weight.options().dtype(at::kDouble));
  const GatedLinearInput<P, T> g{k,           kept.index,        vector ? A(1) : data<A>(t)[0], dot ? data<T>(h) : nullptr,
                                 data<T>(dh), data<double>(dots)};
  for_tasks(split.tasks(), dout.bytes(kBlockRows<P>) + split.bytes(width), [&](int64_t task, Scratch& scratch) {
    const int64_t row = split.row(task), count = split.count(task), padded = round_up(count, 32);
    auto p = split.take(task, padded, depth, width, scratch);
    p.a = dout.rows(row, count, padded, scratch), p.b = data<P>(packed ? w : weight);
    if (!packed) p.ldb = k;
    VLMK_CALL(gated_linear_residual_dh, p, g, row, count);
  });
  double total = 0;
  for (int64_t i = 0; i < dots.numel(); ++i) total += data<double>(dots)[i];
  return total;
}

// dweight, and sum_k (dout^T h) * weight for each channel where asked for.
template <class P, class T>
void weight_gradient(const Tensor& dout_, const Tensor& h_, const Tensor& weight, const Tensor& t, const Kept& kept,
                     const Tensor& dweight, const Tensor& total) {
  using A = acc_t<P>;
  constexpr int64_t width = kBlockCols<P>;
  const int64_t d = weight.size(0), k = weight.size(1), rows = kept.rows;
  const Operand<P> dout(dout_, d, d, kept.index), h(h_, k, k, kept.index);
  const Split<P> split(d, k, width);
  const int64_t blocks = split.col_blocks, most = std::min(kChunkRows, round_up(rows, 32));
  const auto options = weight.options().dtype(scalar_type<P>());
  const Tensor a = on_huge_pages(at::empty({round_up(most, std::min(kPart, most)) * d}, options)),
               b = on_huge_pages(at::empty({most * blocks * width}, options));
  const bool in_place = std::is_same_v<T, A> && dweight.numel();
  const Tensor products = in_place            ? dweight
                          : rows > kChunkRows ? on_huge_pages(at::empty({d, k}, options.dtype(sum_type(scalar_type<P>()))))
                                              : Tensor();
  const Tensor part = at::empty({total.defined() ? blocks : 0, d}, t.options());
  const GatedLinearWeight<P, T> g{d,
                                  k,
                                  data<A>(t),
                                  total.defined() ? data<T>(weight) : nullptr,
                                  products.defined() ? data<A>(products) : nullptr,
                                  data<T>(dweight),
                                  data<A>(part)};
  for (int64_t begin = 0; begin < rows; begin += kChunkRows) {
    const int64_t chunk = std::min(kChunkRows, rows - begin), depth = round_up(chunk, 32);
    const int64_t step = std::min(kPart, depth);
    for_tasks(2 * ceil_div(chunk, step), std::max(dout.bytes(step), h.bytes(step)), [&](int64_t task, Scratch& scratch) {
      const int64_t at = task / 2 * step, count = std::min(step, chunk - at);
      if (task % 2) {
        VLMK_CALL(pack_transposed_a, dout.rows(begin + at, count, count, scratch), d, count, d, step, data<P>(a) + at * d);
        return;
      }
      const P* from = h.rows(begin + at, count, count, scratch);
      for (int64_t k0 = 0; k0 < k; k0 += width) {
        VLMK_CALL(pack_columns_b, from + k0, k, static_cast<const A*>(nullptr), std::min(width, k - k0), count,
                  std::min(step, depth - at), data<P>(b) + k0 * depth + at * width);
      }
    });
    for_tasks(split.tasks(), split.bytes(width), [&](int64_t task, Scratch& scratch) {
      auto p = split.take(task, split.count(task), depth, width, scratch);
      p.a = data<P>(a) + split.row(task) * step, p.b = data<P>(b);
      p.lda = step, p.a_step = step * d, p.part = nullptr;
      VLMK_CALL(gated_linear_residual_dw, p, g, split.row(task), split.count(task), begin > 0, begin + chunk == rows);
    });
  }
  const A* from = data<A>(part);
  double* to = data<double>(total);
  for (int64_t block = 0; to && block < blocks; ++block) {
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
