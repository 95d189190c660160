#pragma once
// What the bridges of gated_residual for CPU and CUDA tensors share.
#include "need.h"

namespace vlmk {

// x: the residual stream, or the gradient of the result.
inline void need_gated_residual(const Need& need, const char* name, const at::Tensor& x, const at::Tensor& y,
                                const at::Tensor& gate, const std::optional<at::Tensor>& row_mask) {
  need.tensor(name, x, {kLeading, kAny}, kFloats);
  need.tensor("y", y, x.sizes(), kFloats);
  need.gate("gate", gate, x.size(-1));
  need.tensor("row_mask", row_mask, x.sizes().slice(0, x.dim() - 1), at::kBool);
}

}  // namespace vlmk
