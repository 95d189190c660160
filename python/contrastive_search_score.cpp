// vlmkernels::contrastive_search_score for CPU tensors (contract: vlmkernels/ops/contrastive_search_score.py).
#include "vlmkernels/contrastive_search_score.h"

#include <torch/library.h>

#include <cmath>

#include "bridge.h"

namespace vlmk {
namespace {

using at::Tensor;
using std::optional;

// The largest cosine of each candidate to the first `lengths` tokens of its sample's context, [B, k].
Tensor repetition(const Tensor& hidden_, const Tensor& context_, const optional<Tensor>& lengths_, at::ScalarType work) {
  const Tensor hidden = hidden_.contiguous(), context = context_.contiguous();
  const int64_t samples = hidden.size(0), k = hidden.size(1), t = context.size(1), d = hidden.size(2);
  const int64_t blocks = ceil_div(k, kCandidates);
  const Tensor lengths = lengths_ ? lengths_->to(at::kLong).contiguous() : Tensor();
  const Tensor out = at::empty({samples, k}, hidden.options().dtype(sum_type(hidden.scalar_type())));
  with_storage(hidden.scalar_type(), [&](auto type) {
    using T = decltype(type);
    for_tasks(samples * blocks, VLMK_CALL(repetition_bytes<T>, d), [&](int64_t task, Scratch& scratch) {
      const int64_t sample = task / blocks, first = task % blocks * kCandidates, row = sample * k + first;
      const int64_t tokens = lengths.defined() ? std::clamp<int64_t>(data<int64_t>(lengths)[sample], 0, t) : t;
      VLMK_CALL(repetition, data<T>(hidden) + row * d, std::min(kCandidates, k - first), data<T>(context) + sample * t * d,
                tokens, d, scratch, data<acc_t<T>>(out) + row);
    });
  });
  return out.to(work);
}

auto contrastive_search_score(const Tensor& prob, const Tensor& hidden, const Tensor& context,
                              const optional<Tensor>& similarity, const optional<Tensor>& context_lengths, double alpha,
                              double beta) {
  const Need need("contrastive_search_score");
  need.tensor("prob", prob, {kAny, kAny}, kFloats);
  const int64_t samples = prob.size(0), k = prob.size(1);
  need.that(k > 0, "prob must be [B, k] of at least one candidate, got sizes ", prob.sizes());
  need.tensor("hidden", hidden, {samples, k, kAny}, kFloats);
  need.tensor("context", context, {samples, kAny, hidden.size(2)}, hidden.scalar_type());
  need.tensor("similarity", similarity, {samples, k}, kFloats);
  need.tensor("context_lengths", context_lengths, samples, kInts);
  need.countable(hidden.sizes());
  need.countable(context.sizes());
  need.that(alpha >= 0 && alpha <= 1, "alpha must be from 0 to 1, got ", alpha);
  need.that(std::isfinite(beta), "beta must be finite, got ", beta);
  need.that(beta == 0 || similarity, "similarity must be given where beta is not 0, got None and beta ", beta);

  at::ScalarType work = c10::promoteTypes(sum_type(prob.scalar_type()), sum_type(hidden.scalar_type()));
  if (similarity) work = c10::promoteTypes(work, sum_type(similarity->scalar_type()));
  const Tensor score = prob.to(work, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous);
  const Tensor repeated = alpha != 0 ? repetition(hidden, context, context_lengths, work) : Tensor();
  const Tensor guided = beta != 0 ? similarity->to(work).contiguous() : Tensor();
  const Tensor best = at::empty({samples}, prob.options().dtype(at::kLong));
  with_storage(work, [&](auto type) {
    using A = acc_t<decltype(type)>;
    for (int64_t i = 0; i < samples; ++i) {
      const auto row = [&](const Tensor& t) { return t.defined() ? data<A>(t) + i * k : nullptr; };
      data<int64_t>(best)[i] = VLMK_CALL(contrastive_search_score, row(score), row(repeated), row(guided), k, alpha, beta);
    }
  });
  return std::make_tuple(best, score);
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) { m.impl("contrastive_search_score", &contrastive_search_score); }

}  // namespace vlmk
