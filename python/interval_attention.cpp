// vlmkernels::interval_attention and interval_attention_bwd for CPU tensors (contracts: vlmkernels/ops/interval_attention.py).
#include <torch/library.h>

#include <array>

#include "attention.h"

namespace vlmk {
namespace {

using at::Tensor;
using std::optional;

std::vector<KeySource> source(const Tensor& key, const Tensor& value, const Tensor& start, const Tensor& end) {
  return {{key, value, clipped(start, key.size(2)), clipped(end, key.size(2))}};
}

void need_inputs(const Need& need, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& start,
                 const Tensor& end, const optional<Tensor>& bias, int64_t grid_rows, int64_t grid_cols) {
  need_attention(need, query, {{"key", key, "value", value}});
  const int64_t batch = query.size(0), heads = query.size(1), tq = query.size(2);
  start.dim() == 2 ? need.tensor("start", start, {batch, tq}, kInts) : need.tensor("start", start, tq, kInts);
  need.tensor("end", end, start.sizes(), start.scalar_type());
  if (!bias) return;
  need.tensor("relative_bias", bias, {heads, kAny, kAny}, kFloats);
  const auto half = [&](int64_t dim) { return bias->size(dim) % 2 ? bias->size(dim) / 2 + 1 : 0; };
  need.that(grid_rows > 0 && grid_rows == half(1) && grid_cols > 0 && grid_cols == half(2),
            "relative_bias must be [heads, 2 rows - 1, 2 columns - 1] of a grid of at least one row and column, got sizes ",
            bias->sizes(), " for ", grid_rows, " rows and ", grid_cols, " columns");
  need.countable({need.product({batch, heads}), bias->size(1), bias->size(2)});
}

// They and `causal` describe the mask to other libraries on CUDA (vlmkernels/_providers.py). Here they are not read.
void need_ends(const Need& need, const optional<Tensor>& query_ends, const optional<Tensor>& key_ends) {
  need.tensor("query_ends", query_ends, kAny, at::kInt);
  need.tensor("key_ends", key_ends, kAny, at::kInt);
}

std::tuple<Tensor, Tensor> interval_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& start,
                                              const Tensor& end, double scale, const optional<Tensor>& bias, int64_t grid_rows,
                                              int64_t grid_cols, optional<bool> causal, const optional<Tensor>& query_ends,
                                              const optional<Tensor>& key_ends) {
  const Need need("interval_attention");
  need_inputs(need, query, key, value, start, end, bias, grid_rows, grid_cols);
  need_ends(need, query_ends, key_ends);
  if (query.size(-1) == 0 || value.size(-1) == 0) {
    const auto [out, lse] = interval_attention(with_width(query), with_width(key), with_width(value), start, end, scale, bias,
                                               grid_rows, grid_cols, causal, query_ends, key_ends);
    return {out.narrow(-1, 0, value.size(-1)), lse};
  }
  const auto attend = [&](auto type) -> std::tuple<Tensor, Tensor> {
    AttentionInputs<decltype(type)> inputs(query, source(key, value, start, end), scale, bias, grid_rows, grid_cols);
    const auto [out, lse] = attention_forward(inputs);
    return {out.to(query.scalar_type()), lse};
  };
  // Few queries need no product of tiles: keys in bfloat16 are read as they are, whatever products the CPU has.
  if (query.scalar_type() == at::kBFloat16 && query.size(2) <= kFewQueries) return attend(bf16());
  return with_operand(query.scalar_type(), attend);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> interval_attention_bwd(const Tensor& dout, const optional<Tensor>& dlse,
                                                                  const Tensor& query, const Tensor& key, const Tensor& value,
                                                                  const Tensor& start, const Tensor& end, const Tensor& out,
                                                                  const Tensor& lse, double scale, const optional<Tensor>& bias,
                                                                  int64_t grid_rows, int64_t grid_cols, optional<bool> causal,
                                                                  const optional<Tensor>& query_ends,
                                                                  const optional<Tensor>& key_ends, std::array<bool, 4> needs) {
  const Need need("interval_attention_bwd");
  need_inputs(need, query, key, value, start, end, bias, grid_rows, grid_cols);
  need_ends(need, query_ends, key_ends);
  need_gradient(need, query, value.size(-1), dout, dlse, out, lse);
  need.that(bias || !needs[3], "relative_bias must be given for its gradient");
  if (query.size(-1) == 0 || value.size(-1) == 0) {
    const auto [dq, dk, dv, dbias] =
        interval_attention_bwd(with_width(dout), dlse, with_width(query), with_width(key), with_width(value), start, end,
                               with_width(out), lse, scale, bias, grid_rows, grid_cols, causal, query_ends, key_ends, needs);
    const auto narrowed = [](const Tensor& x, const Tensor& like, bool need) {
      return need ? x.narrow(-1, 0, like.size(-1)) : x;
    };
    return {narrowed(dq, query, needs[0]), narrowed(dk, key, needs[1]), narrowed(dv, value, needs[2]), dbias};
  }
  return with_operand(query.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    AttentionInputs<decltype(type)> inputs(query, source(key, value, start, end), scale, bias, grid_rows, grid_cols);
    const auto grads = attention_backward(inputs, dout, dlse, out, lse, {needs[0], needs[1], needs[2], needs[3]});
    const auto given = [&](bool need, const auto& get, const Tensor& like) {
      return need ? get().to(like.scalar_type()) : at::empty({0}, like.options());
    };
    return {given(
                needs[0], [&] { return grads.dquery; }, query),
            given(
                needs[1], [&] { return grads.dkey[0]; }, key),
            given(
                needs[2], [&] { return grads.dvalue[0]; }, value),
            given(needs[3], [&] { return grads.dbias; }, bias ? *bias : query)};
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) {
  m.impl("interval_attention", &interval_attention);
  m.impl("interval_attention_bwd", &interval_attention_bwd);
}

}  // namespace vlmk
