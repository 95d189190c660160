// vlmkernels::linear_cross_entropy_sweep for CPU tensors (contract: vlmkernels/ops/_linear_cross_entropy_sweep.py).
#include "linear_cross_entropy.h"

#include <torch/library.h>

namespace vlmk {
namespace {

using at::Tensor;
using std::optional;

auto linear_cross_entropy_sweep(const Tensor& hidden, const Tensor& weight, const Tensor& target, const optional<Tensor>& bias,
                                const optional<Tensor>& column_scale, const Tensor& row_coef, double label_smoothing,
                                bool need_hidden, bool need_weight, bool need_bias) {
  const Need need("linear_cross_entropy (linear_cross_entropy_sweep)");
  need.tensor("hidden", hidden, {kAny, kAny}, kFloats);
  const int64_t n = hidden.size(0), d = hidden.size(1);
  need.tensor("weight", weight, {kAny, d}, hidden.scalar_type());
  const int64_t v = weight.size(0);
  need.that(v > 0 && d > 0, "weight must have rows and columns, got sizes ", weight.sizes());
  need.indices("target", target, n, v);
  need.that(n == 0 || target.min().item<int64_t>() >= 0, "target must be in [0, ", v, ")");
  need.tensor("bias", bias, v, kFloats);
  need.tensor("column_scale", column_scale, v, kFloats);
  need.tensor("row_coef", row_coef, n, sum_type(hidden.scalar_type()));
  need.that(label_smoothing >= 0 && label_smoothing < 1, "label_smoothing must be in [0, 1), got ", label_smoothing);
  need.countable({n, std::max(v, d)});
  need.countable({v, d});
  return with_operand(hidden.scalar_type(), [&](auto type) {
    using P = decltype(type);
    using A = acc_t<P>;
    using Kernel = LinearCrossEntropy<P>;
    Head<P> head(hidden, weight, bias, row_coef, {need_hidden, need_weight, need_bias});
    head.in_chunks(kWorkspace, head.need_grad(), head.row_blocks());
    Kernel& g = head.kernel;
    const Tensor scale_of = head.vector(column_scale), index = target.contiguous();
    const Tensor parts = at::empty({3, head.chunks, g.pairs.m}, head.sums), rows = at::empty({3, g.pairs.m}, head.sums);
    A *part = data<A>(parts), *row = data<A>(rows);
    g.target = data<int64_t>(index), g.class_scale = data<A>(scale_of), g.smoothing = static_cast<A>(label_smoothing);
    g.max = part, g.sum = part + head.chunks * g.pairs.m, g.total = part + 2 * head.chunks * g.pairs.m;
    g.target_logit = row, g.row_max = row + g.pairs.m, g.row_log = row + 2 * g.pairs.m;
    while (head.next()) {
      head.for_classes([&](int64_t chunk, int64_t jb, Scratch& scratch) {
        VLMK_CALL(linear_cross_entropy_logits, g, chunk, jb, g.tiles ? nullptr : scratch.take<A>(kTileSize));
      });
      head.for_rows([&](int64_t jb) { VLMK_CALL(linear_cross_entropy_rows, g, jb); });
      if (head.need_grad()) head.products([](int64_t) {});
    }
    return head.results(hidden, weight, bias);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) { m.impl("linear_cross_entropy_sweep", &linear_cross_entropy_sweep); }

}  // namespace vlmk
