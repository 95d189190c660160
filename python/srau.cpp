// vlmkernels::srau and srau_bwd for CPU tensors (contracts: vlmkernels/ops/srau.py).
#include "vlmkernels/srau.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <string_view>

#include "dtypes.h"
#include "memory.h"
#include "need.h"

namespace vlmk {
namespace {

using at::Tensor;
using std::optional;

// Of the language in one task, at all levels.
constexpr int64_t kBlockElements = 1 << 14;

// The operands in one dtype and contiguous.
struct SrauCall {
  SrauCall(const Need& need, const optional<Tensor>& dout_, const Tensor& language_, const Tensor& visual_,
           const Tensor& gate_logits_, const optional<Tensor>& row_mask, double tau_, std::string_view orientation)
      : tau(tau_), negated(orientation == "paper") {
    need.tensor("language", language_, {kLeading, kAny}, kFloats);
    const auto sizes = language_.sizes();
    c10::DimVector stacked{visual_.defined() && visual_.dim() ? visual_.size(0) : 1};
    stacked.append(sizes.begin(), sizes.end());
    const bool one = visual_.defined() && visual_.dim() == language_.dim();
    need.tensor("visual", visual_, one ? sizes : at::IntArrayRef(stacked), kFloats);
    need.tensor("gate_logits", gate_logits_, visual_.sizes(), kFloats);
    need.tensor("dout", dout_, sizes, kFloats);
    need.tensor("row_mask", row_mask, sizes.slice(0, sizes.size() - 1), at::kBool);
    need.countable(visual_.sizes());
    levels = one ? 1 : visual_.size(0);
    need.that(levels > 0, "visual must have at least one level, got sizes ", visual_.sizes());
    need.that(tau >= 0 && tau <= 0.5, "tau must be in [0, 0.5], got ", tau);
    need.that(negated || orientation == "code", "orientation must be 'code' or 'paper', got '", orientation, "'");
    result = c10::promoteTypes(language_.scalar_type(), visual_.scalar_type());
    dtype = c10::promoteTypes(result, gate_logits_.scalar_type());
    if (dout_) dtype = c10::promoteTypes(dtype, dout_->scalar_type());
    language = language_.to(dtype).contiguous();
    visual = visual_.to(dtype).contiguous();
    gate_logits = gate_logits_.to(dtype).contiguous();
    if (dout_) dout = dout_->to(dtype).contiguous();
    if (row_mask) mask = row_mask->contiguous();
    d = sizes.back();
    rows = d ? language.numel() / d : 0;
    block = std::max<int64_t>(kBlockElements / std::max<int64_t>(d, 1), 1);
  }

  // What begins at a row.
  template <class T>
  SrauInputs<T> inputs(int64_t first, int64_t count) const {
    const int64_t offset = first * d;
    return {data<T>(language) + offset,
            data<T>(visual) + offset,
            data<T>(gate_logits) + offset,
            mask.defined() ? data<bool>(mask) + first : nullptr,
            count,
            d,
            levels,
            language.numel(),
            tau,
            negated};
  }
  // f(first row, rows) of every block.
  template <class F>
  void each_block(const F& f) const {
    at::parallel_for(0, (rows + block - 1) / block, 1,
                     [&](int64_t begin, int64_t end) { f(begin * block, std::min(end * block, rows) - begin * block); });
  }
  Tensor made(const Tensor& like, bool need) const {
    return on_huge_pages(at::empty(need ? like.sizes() : at::IntArrayRef{0}, like.options()));
  }

  Tensor dout, language, visual, gate_logits, mask;
  at::ScalarType result, dtype;
  double tau;
  bool negated;
  int64_t levels, d, rows, block;
};

Tensor srau(const Tensor& language, const Tensor& visual, const Tensor& gate_logits, const optional<Tensor>& row_mask,
            double tau, std::string_view orientation) {
  const SrauCall call(Need("srau"), std::nullopt, language, visual, gate_logits, row_mask, tau, orientation);
  const Tensor out = call.made(call.language, true);
  with_storage(call.dtype, [&](auto type) {
    using T = decltype(type);
    call.each_block(
        [&](int64_t first, int64_t count) { VLMK_CALL(srau, call.inputs<T>(first, count), data<T>(out) + first * call.d); });
  });
  return out.to(call.result);
}

std::tuple<Tensor, Tensor, Tensor> srau_bwd(const Tensor& dout, const Tensor& language, const Tensor& visual,
                                            const Tensor& gate_logits, const optional<Tensor>& row_mask, double tau,
                                            std::string_view orientation, std::array<bool, 3> needs) {
  const SrauCall call(Need("srau_bwd"), dout, language, visual, gate_logits, row_mask, tau, orientation);
  const auto [need_language, need_visual, need_logits] = needs;
  const Tensor dlanguage = call.made(call.language, need_language), dvisual = call.made(call.visual, need_visual),
               dlogits = call.made(call.gate_logits, need_logits);
  with_storage(call.dtype, [&](auto type) {
    using T = decltype(type);
    if (!need_language && !need_visual && !need_logits) return;
    call.each_block([&](int64_t first, int64_t count) {
      const int64_t offset = first * call.d;
      VLMK_CALL(srau_bwd, data<T>(call.dout) + offset, call.inputs<T>(first, count),
                need_language ? data<T>(dlanguage) + offset : nullptr, need_visual ? data<T>(dvisual) + offset : nullptr,
                need_logits ? data<T>(dlogits) + offset : nullptr);
    });
  });
  return {dlanguage.to(language.scalar_type()), dvisual.to(visual.scalar_type()), dlogits.to(gate_logits.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) {
  m.impl("srau", &srau);
  m.impl("srau_bwd", &srau_bwd);
}

}  // namespace vlmk
