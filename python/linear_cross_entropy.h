#pragma once
// The classes of a linear layer and chunks of rows of hidden states: the operands, results and tasks of every loss of their
// logits.
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <tuple>

#include "pairwise.h"
#include "vlmkernels/linear_cross_entropy.h"

namespace vlmk {

constexpr int64_t kWorkspace = int64_t(1) << 27;  // bytes of logits held at once, or one block of rows'

template <class P>
class Head {
 public:
  using A = acc_t<P>;
  using Kernel = LinearCrossEntropy<P>;

  Head(const at::Tensor& hidden, const at::Tensor& weight, const std::optional<at::Tensor>& bias, const at::Tensor& row_coef,
       std::array<bool, 3> needs)
      : sums(hidden.options().dtype(scalar_type<A>())), features_(weight, hidden, at::ones({}, sums), {}, {}), needs_(needs) {
    features_.pack_kt();
    if (needs[1]) features_.pack_k();
    const Pairs<P>& p = features_.pairs;
    bias_ = vector(bias), coef_ = row_coef.contiguous(), loss_ = at::empty({p.m}, sums);
    kernel.pairs = p;
    kernel.need_hidden = needs[0], kernel.need_weight = needs[1], kernel.need_bias = needs[2];
    kernel.bias = data<A>(bias_), kernel.row_coef = data<A>(coef_), kernel.loss = data<A>(loss_);
    kernel.chunk_classes = chunk_of(p.row_blocks(), 64);
    chunks = ceil_div(p.row_blocks(), kernel.chunk_classes);
  }

  // Plans chunks of rows whose tiles of logits take this many bytes, or if they are not kept, of so many blocks.
  void in_chunks(int64_t bytes, bool kept, int64_t blocks) {
    const Pairs<P>& p = kernel.pairs;
    const int64_t tiles = round_up(p.row_blocks(), Kernel::group) * kTileSize;
    if (kept) blocks = bytes / std::max<int64_t>(tiles * static_cast<int64_t>(sizeof(A)), 1);
    step_ = std::clamp<int64_t>(blocks, 1, std::max<int64_t>(row_blocks(), 1));
    const auto operands = features_.query.options();
    tiles_ = on_huge_pages(at::empty({kept ? step_ * tiles : 0}, sums));
    dhidden_ = on_huge_pages(at::empty({needs_[0] ? p.m : 0, p.d}, operands));
    dweight_ = on_huge_pages(at::empty({needs_[1] ? p.n : 0, p.d}, operands));
    bias_sums_ = at::zeros({needs_[2] ? p.n : 0}, sums.dtype(at::kDouble));
    weight_sums_ = dweight_;
    if constexpr (!std::is_same_v<P, A>) {  // else the gradient of the weight is its own sum
      weight_sums_ = on_huge_pages(at::empty({needs_[1] && step_ < row_blocks() ? p.n : 0, p.depth}, sums));
    }
    if (p.m == 0) dweight_.zero_();
    kernel.tiles = data<A>(tiles_), kernel.weight_sums = data<A>(weight_sums_), kernel.bias_sums = data<double>(bias_sums_);
    kernel.dhidden = data<P>(dhidden_), kernel.dweight = data<P>(dweight_);
  }

  // Goes on to the next chunk of rows, if there is one.
  bool next() {
    kernel.first = kernel.last, kernel.last = std::min(kernel.first + step_, row_blocks());
    return kernel.first < row_blocks();
  }
  // f(chunk of classes, block of rows, scratch) of two tiles.
  template <class F>
  void for_classes(F f) const {
    const int64_t blocks = kernel.last - kernel.first;
    for_tasks(chunks * blocks, 2 * kTileSize * sizeof(A) + 64,
              [&](int64_t task, Scratch& scratch) { f(task / blocks, kernel.first + task % blocks, scratch); });
  }
  // f(block of rows)
  template <class F>
  void for_rows(F f) const {
    for_tasks(kernel.last - kernel.first, 0, [&](int64_t task, Scratch&) { f(kernel.first + task); });
  }
  // The products with the gradients of this chunk; before its own, form(group of classes) is called.
  template <class F>
  void products(F form) const {
    constexpr int64_t group = Kernel::group;
    const Pairs<P>& p = kernel.pairs;
    const int64_t operand = group * kTileSize * sizeof(P), weight_bytes = group * kTileRows * p.depth * sizeof(A);
    for_tasks(kernel.groups(), operand + weight_bytes + 128, [&](int64_t task, Scratch& scratch) {
      form(task);
      P* paired = scratch.take<P>(group * kTileSize);
      VLMK_CALL(linear_cross_entropy_classes, kernel, task, paired, scratch.take<A>(group * kTileRows * p.depth));
    });
    if (!needs_[0]) return;
    const int64_t blocks = kernel.last - kernel.first;
    const int64_t width = part_of(p.d), widths = ceil_div(p.d, width), spans = ceil_div(blocks, kBlocks);
    const int64_t out = (kBlocks + 1) * width * kTileCols, packed = width * group * kTileRows;
    for_tasks(widths * spans, out * sizeof(A) + packed * sizeof(P) + 128, [&](int64_t task, Scratch& scratch) {
      const int64_t jb = kernel.first + task / widths * kBlocks, d = task % widths * width;
      A* sum = scratch.take<A>(out);
      VLMK_CALL(linear_cross_entropy_hidden, kernel, jb, std::min(jb + kBlocks, kernel.last), d, std::min(d + width, p.d), sum,
                scratch.take<P>(packed));
    });
  }

  // The losses of the rows, and the gradients of what was given.
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> results(const at::Tensor& hidden, const at::Tensor& weight,
                                                                     const std::optional<at::Tensor>& bias) const {
    return {loss_, as_given(dhidden_, hidden, needs_[0]), as_given(dweight_, weight, needs_[1]),
            as_given(bias_sums_, bias ? *bias : weight, needs_[2])};
  }
  // [V] in the precision of sums, or nothing.
  at::Tensor vector(const std::optional<at::Tensor>& t) const { return t ? t->to(sums.dtype()).contiguous() : at::Tensor(); }
  bool need_grad() const { return needs_[0] || needs_[1] || needs_[2]; }
  int64_t row_blocks() const { return kernel.pairs.col_blocks(); }
  int64_t step() const { return step_; }  // blocks of rows at once
  int64_t tiles() const { return tiles_.numel(); }

  const at::TensorOptions sums;
  Kernel kernel{};
  int64_t chunks;  // of classes

 private:
  static constexpr int64_t kWidths = 4, kBlocks = 2;  // parts of the width, and blocks of rows, of one task of dhidden
  // Whole vectors of features for each of the parts that share them: a fixed function of the shape.
  static int64_t part_of(int64_t d) { return std::max<int64_t>(64, whole_units(ceil_div(d, kWidths))); }

  Features<P> features_;
  const std::array<bool, 3> needs_;
  at::Tensor bias_, coef_, loss_, tiles_, dhidden_, dweight_, bias_sums_, weight_sums_;
  int64_t step_ = 1;
};

}  // namespace vlmk
