// vlmkernels::linear_cross_entropy_sweep for CPU tensors (contract: vlmkernels/ops/_linear_cross_entropy_sweep.py).
#include "vlmkernels/linear_cross_entropy.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "pairwise.h"

namespace vlmk {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kWorkspace = int64_t(1) << 27;  // bytes of logits held at once, or one block of rows'
constexpr int64_t kWidths = 4, kBlocks = 2;       // parts of the width, and blocks of rows, of one task of dhidden

// Whole vectors of features for each of the parts that share them: a fixed function of the shape.
int64_t part_of(int64_t d) { return std::max<int64_t>(64, whole_units(ceil_div(d, kWidths))); }

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
    constexpr int64_t group = Kernel::group;
    const bool need_grad = need_hidden || need_weight || need_bias;
    Features<P> features(weight, hidden, at::ones({}, hidden.options().dtype(scalar_type<A>())), {}, {});
    features.pack_kt();
    if (need_weight) features.pack_k();
    const Pairs<P>& p = features.pairs;
    const int64_t class_blocks = p.row_blocks(), row_blocks = p.col_blocks();
    const auto operands = features.query.options(), sums = operands.dtype(scalar_type<A>());
    const auto vector = [&](const optional<Tensor>& t) { return t ? t->to(sums.dtype()).contiguous() : Tensor(); };
    const Tensor bias_of = vector(bias), scale_of = vector(column_scale), coef = row_coef.contiguous(),
                 index = target.contiguous();
    const int64_t block_bytes = round_up(class_blocks, group) * kTileSize * static_cast<int64_t>(sizeof(A));
    const int64_t fitting =
        std::clamp<int64_t>(kWorkspace / std::max<int64_t>(block_bytes, 1), 1, std::max<int64_t>(row_blocks, 1));
    const int64_t step = need_grad ? fitting : std::max<int64_t>(row_blocks, 1);
    const int64_t chunk_classes = chunk_of(class_blocks, 64), chunks = ceil_div(class_blocks, chunk_classes);

    const Tensor parts = at::empty({3, chunks, p.m}, sums), rows = at::empty({3, p.m}, sums);
    const Tensor loss = at::empty({p.m}, sums);
    const Tensor tiles = on_huge_pages(at::empty({need_grad ? step * round_up(class_blocks, group) * kTileSize : 0}, sums));
    const Tensor dhidden = on_huge_pages(at::empty({need_hidden ? p.m : 0, p.d}, operands));
    const Tensor dweight = on_huge_pages(at::empty({need_weight ? p.n : 0, p.d}, operands));
    const Tensor bias_sums = at::zeros({need_bias ? p.n : 0}, sums.dtype(at::kDouble));
    const bool in_place = std::is_same_v<P, A>;  // the gradient of the weight is its own sum
    Tensor weight_sums = dweight;
    if (!in_place) weight_sums = on_huge_pages(at::empty({need_weight && step < row_blocks ? p.n : 0, p.depth}, sums));
    if (p.m == 0) dweight.zero_();
    A *part = data<A>(parts), *row = data<A>(rows);
    Kernel g{p,
             data<int64_t>(index),
             data<A>(bias_of),
             data<A>(scale_of),
             data<A>(coef),
             static_cast<A>(label_smoothing),
             need_hidden,
             need_weight,
             need_bias,
             chunk_classes,
             part,
             part + chunks * p.m,
             part + 2 * chunks * p.m,
             row,
             row + p.m,
             row + 2 * p.m,
             data<A>(loss),
             data<A>(tiles),
             0,
             0,
             data<A>(weight_sums),
             data<double>(bias_sums),
             data<P>(dhidden),
             data<P>(dweight)};
    for (int64_t first = 0; first < row_blocks; first = g.last) {
      g.first = first, g.last = std::min(first + step, row_blocks);
      const int64_t blocks = g.last - first;
      for_tasks(chunks * blocks, kTileSize * sizeof(A), [&](int64_t task, Scratch& scratch) {
        A* z = need_grad ? nullptr : scratch.take<A>(kTileSize);
        VLMK_CALL(linear_cross_entropy_logits, g, task / blocks, first + task % blocks, z);
      });
      for_tasks(blocks, 0, [&](int64_t task, Scratch&) { VLMK_CALL(linear_cross_entropy_rows, g, first + task); });
      if (!need_grad) continue;
      const int64_t operand = group * kTileSize * sizeof(P), weight_bytes = group * kTileRows * p.depth * sizeof(A);
      for_tasks(g.groups(), operand + weight_bytes + 128, [&](int64_t task, Scratch& scratch) {
        P* paired = scratch.take<P>(group * kTileSize);
        VLMK_CALL(linear_cross_entropy_classes, g, task, paired, scratch.take<A>(group * kTileRows * p.depth));
      });
      if (!need_hidden) continue;
      const int64_t width = part_of(p.d), widths = ceil_div(p.d, width), spans = ceil_div(blocks, kBlocks);
      const int64_t out = (kBlocks + 1) * width * kTileCols, packed = width * group * kTileRows;
      for_tasks(widths * spans, out * sizeof(A) + packed * sizeof(P) + 128, [&](int64_t task, Scratch& scratch) {
        const int64_t jb = first + task / widths * kBlocks, d = task % widths * width;
        A* sum = scratch.take<A>(out);
        VLMK_CALL(linear_cross_entropy_hidden, g, jb, std::min(jb + kBlocks, g.last), d, std::min(d + width, p.d), sum,
                  scratch.take<P>(packed));
      });
    }
    return std::make_tuple(loss, as_given(dhidden, hidden, need_hidden), as_given(dweight, weight, need_weight),
                           as_given(bias_sums, bias ? *bias : weight, need_bias));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) { m.impl("linear_cross_entropy_sweep", &linear_cross_entropy_sweep); }

}  // namespace vlmk
