// vlmkernels::perceiver_attention and perceiver_attention_bwd for CPU tensors (contracts:
// vlmkernels/ops/perceiver_attention.py).
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <array>

#include "attention.h"

namespace vlmk {
namespace {

using at::Tensor;
using std::optional;

// Every query sees the first media_lengths tokens of its sample's media, and all latents.
std::vector<KeySource> sources(const Tensor& query, const Tensor& media_key, const Tensor& media_value,
                               const Tensor& latent_key, const Tensor& latent_value, const optional<Tensor>& media_lengths) {
  const int64_t queries = query.size(2), media = media_key.size(2), latents = latent_key.size(2);
  const auto options = query.options().dtype(at::kInt);
  const auto all = [&](int64_t count) { return at::full({1, queries}, count, options); };
  const Tensor none = at::zeros({1, queries}, options);
  if (!media_lengths) return {{media_key, media_value, none, all(media)}, {latent_key, latent_value, none, all(latents)}};
  const Tensor lengths = clipped(media_lengths->unsqueeze(1).expand({query.size(0), queries}), media);
  const Tensor start = at::zeros({query.size(0), queries}, options);
  return {{media_key, media_value, start, lengths}, {latent_key, latent_value, none, all(latents)}};
}

void need_inputs(const Need& need, const Tensor& query, const Tensor& media_key, const Tensor& media_value,
                 const Tensor& latent_key, const Tensor& latent_value, const optional<Tensor>& media_lengths) {
  need_attention(
      need, query,
      {{"media_key", media_key, "media_value", media_value}, {"latent_key", latent_key, "latent_value", latent_value}});
  need.tensor("media_lengths", media_lengths, query.size(0), kInts);
}

std::tuple<Tensor, Tensor> perceiver_attention(const Tensor& query, const Tensor& media_key, const Tensor& media_value,
                                               const Tensor& latent_key, const Tensor& latent_value,
                                               const optional<Tensor>& media_lengths, double scale) {
  need_inputs(Need("perceiver_attention"), query, media_key, media_value, latent_key, latent_value, media_lengths);
  if (query.size(-1) == 0 || media_value.size(-1) == 0) {
    const auto [out, lse] = perceiver_attention(with_width(query), with_width(media_key), with_width(media_value),
                                                with_width(latent_key), with_width(latent_value), media_lengths, scale);
    return {out.narrow(-1, 0, media_value.size(-1)), lse};
  }
  return with_operand(query.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor> {
    const auto from = sources(query, media_key, media_value, latent_key, latent_value, media_lengths);
    AttentionInputs<decltype(type)> inputs(query, from, scale, std::nullopt, 0, 0);
    const auto [out, lse] = attention_forward(inputs);
    return {out.to(query.scalar_type()), lse};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> perceiver_attention_bwd(const Tensor& dout, const Tensor& query,
                                                                           const Tensor& media_key, const Tensor& media_value,
                                                                           const Tensor& latent_key, const Tensor& latent_value,
                                                                           const optional<Tensor>& media_lengths,
                                                                           const Tensor& out, const Tensor& lse, double scale,
                                                                           std::array<bool, 5> needs) {
  const Need need("perceiver_attention_bwd");
  need_inputs(need, query, media_key, media_value, latent_key, latent_value, media_lengths);
  need_gradient(need, query, media_value.size(-1), dout, std::nullopt, out, lse);
  const Tensor inputs_of[] = {query, media_key, media_value, latent_key, latent_value};
  if (query.size(-1) == 0 || media_value.size(-1) == 0) {
    const auto [dq, dmk, dmv, dlk, dlv] = perceiver_attention_bwd(
        with_width(dout), with_width(query), with_width(media_key), with_width(media_value), with_width(latent_key),
        with_width(latent_value), media_lengths, with_width(out), lse, scale, needs);
    const auto narrowed = [&](const Tensor& x, int64_t i) { return needs[i] ? x.narrow(-1, 0, inputs_of[i].size(-1)) : x; };
    return {narrowed(dq, 0), narrowed(dmk, 1), narrowed(dmv, 2), narrowed(dlk, 3), narrowed(dlv, 4)};
  }
  return with_operand(query.scalar_type(), [&](auto type) -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> {
    const auto from = sources(query, media_key, media_value, latent_key, latent_value, media_lengths);
    AttentionInputs<decltype(type)> inputs(query, from, scale, std::nullopt, 0, 0);
    const auto grads =
        attention_backward(inputs, dout, std::nullopt, out, lse, {needs[0], needs[1] || needs[3], needs[2] || needs[4], false});
    const auto given = [&](int64_t i, const auto& get) {
      return needs[i] ? get().to(query.scalar_type()) : at::empty({0}, query.options());
    };
    return {given(0, [&] { return grads.dquery; }), given(1, [&] { return grads.dkey[0]; }),
            given(2, [&] { return grads.dvalue[0]; }), given(3, [&] { return grads.dkey[1]; }),
            given(4, [&] { return grads.dvalue[1]; })};
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) {
  m.impl("perceiver_attention", &perceiver_attention);
  m.impl("perceiver_attention_bwd", &perceiver_attention_bwd);
}

}  // namespace vlmk
