// vlmkernels::relative_representation for CPU tensors (contract: vlmkernels/ops/relative_representation.py).
#include "vlmkernels/relative_representation.h"

#include <torch/library.h>

#include <cmath>

#include "bridge.h"

namespace vlmk {
namespace {

using at::Tensor;

// Similarities of all rows of one task: a fixed number.
constexpr int64_t kTaskElements = 1 << 14;

Tensor relative_representation(const Tensor& similarities_, double p) {
  const Need need("relative_representation");
  need.tensor("similarities", similarities_, {kAny, kAny}, kFloats);
  need.countable(similarities_.sizes());
  need.that(p > 0 && std::isfinite(p), "p must be positive and finite, got ", p);
  const Tensor similarities = similarities_.contiguous();
  const Tensor values = at::empty(similarities.sizes(), similarities.options().dtype(sum_type(similarities.scalar_type())));
  const int64_t rows = similarities.size(0), k = similarities.size(1);
  const int64_t block = std::max<int64_t>(kTaskElements / std::max<int64_t>(k, 1), 1);
  with_storage(similarities.scalar_type(), [&](auto type) {
    using T = decltype(type);
    for_tasks(k ? ceil_div(rows, block) : 0, 0, [&](int64_t task, Scratch&) {
      const int64_t first = task * block;
      VLMK_CALL(relative_representation, data<T>(similarities) + first * k, std::min(block, rows - first), k, p,
                data<acc_t<T>>(values) + first * k);
    });
  });
  return values;
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) { m.impl("relative_representation", &relative_representation); }

}  // namespace vlmk
