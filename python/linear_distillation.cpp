// vlmkernels::linear_distillation_sweep for CPU tensors (contract: vlmkernels/ops/_linear_distillation_sweep.py).
#include "vlmkernels/linear_distillation.h"

#include <torch/library.h>

#include <cmath>
#include <string_view>

#include "linear_cross_entropy.h"

namespace vlmk {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kBlocksAtOnce = 16;  // of rows, where no logits are kept

// Each row of the indices ascends within [0, classes).
void need_ascending(const Need& need, const Tensor& indices, int64_t classes) {
  const int64_t rows = indices.size(0), k = indices.size(1), *index = data<int64_t>(indices);
  bool ascending = true;
  for (int64_t i = 0; i < rows * k; ++i) {
    ascending &= index[i] < classes && index[i] >= 0 && (i % k == 0 || index[i] > index[i - 1]);
  }
  need.that(ascending, "indices must ascend in each row, in [0, ", classes, ")");
}

auto linear_distillation_sweep(const Tensor& student_hidden, const Tensor& student_weight,
                               const optional<Tensor>& teacher_hidden, const optional<Tensor>& teacher_weight,
                               const optional<Tensor>& student_bias, const optional<Tensor>& teacher_bias,
                               const optional<Tensor>& log_probs, const optional<Tensor>& indices_,
                               const optional<Tensor>& target, const Tensor& row_coef, double temperature,
                               std::string_view divergence, double beta, double hard_weight, bool need_hidden, bool need_weight,
                               bool need_bias) {
  const Need need("linear_distillation (linear_distillation_sweep)");
  need.tensor("student_hidden", student_hidden, {kAny, kAny}, kFloats);
  const int64_t n = student_hidden.size(0), d = student_hidden.size(1);
  const at::ScalarType dtype = student_hidden.scalar_type(), sums = sum_type(dtype);
  need.tensor("student_weight", student_weight, {kAny, d}, dtype);
  const int64_t v = student_weight.size(0);
  need.that(v > 0 && d > 0, "student_weight must have rows and columns, got sizes ", student_weight.sizes());
  need.tensor("student_bias", student_bias, v, kFloats);
  need.that(teacher_hidden.has_value() == teacher_weight.has_value() && indices_.has_value() == log_probs.has_value() &&
                (hard_weight < 1) == (teacher_hidden.has_value() != indices_.has_value()),
            "a teacher must be teacher_hidden and teacher_weight, or log_probs and indices, and none if hard_weight is 1");
  int64_t width = d;
  if (teacher_hidden) {
    need.tensor("teacher_hidden", *teacher_hidden, {n, kAny}, kFloats);
    width = teacher_hidden->size(1);
    need.tensor("teacher_weight", *teacher_weight, {v, width}, teacher_hidden->scalar_type());
    need.that(width > 0, "teacher_hidden must have columns");
    need.that(sum_type(teacher_hidden->scalar_type()) == sums, "student and teacher must both be float64, or neither");
  }
  need.tensor("teacher_bias", teacher_bias, v, kFloats);
  Tensor indices;
  if (indices_) {
    need.tensor("indices", *indices_, {n, kAny}, at::kLong);
    need.tensor("log_probs", *log_probs, indices_->sizes(), sums);
    indices = indices_->contiguous();
    need_ascending(need, indices, v);
  }
  need.that(hard_weight >= 0 && hard_weight <= 1, "hard_weight must be in [0, 1], got ", hard_weight);
  need.that(hard_weight == 0 || target, "target must be given with hard_weight ", hard_weight);
  if (target) {
    need.indices("target", *target, n, v);
    need.that(n == 0 || target->min().item<int64_t>() >= 0, "target must be in [0, ", v, ")");
  }
  need.tensor("row_coef", row_coef, n, sums);
  need.that(temperature > 0 && std::isfinite(temperature), "temperature must be positive and finite, got ", temperature);
  need.that(beta > 0 && beta < 1, "beta must be in (0, 1), got ", beta);
  const bool jsd = divergence == "jsd", reverse = divergence == "reverse_kl";
  need.that(jsd || reverse || divergence == "forward_kl", "divergence must be 'forward_kl', 'reverse_kl' or 'jsd', got '",
            divergence, "'");
  need.that(!reverse || !indices_, "divergence must be 'forward_kl' or 'jsd' with log_probs, got 'reverse_kl'");
  need.countable({n, std::max({v, d, width})});
  need.countable({v, std::max(d, width)});

  const auto run = [&](auto type, auto teacher_type) {
    using P = decltype(type);
    using Q = decltype(teacher_type);
    using A = acc_t<P>;
    Head<P> head(student_hidden, student_weight, student_bias, row_coef, {need_hidden, need_weight, need_bias});
    LinearCrossEntropy<P>& student = head.kernel;
    student.formed = true;
    const bool taught = teacher_hidden.has_value(), mixed = taught && jsd, kept = head.need_grad() || mixed;
    head.in_chunks(taught ? kWorkspace / 2 : kWorkspace, kept, kBlocksAtOnce);
    const Tensor classes = contiguous(target), logits = at::empty({n}, head.sums);
    student.target = data<int64_t>(classes), student.target_logit = data<A>(logits);

    optional<Features<Q>> teacher;
    if (taught) {
      teacher.emplace(*teacher_weight, *teacher_hidden, at::ones({}, head.sums), optional<Tensor>(), optional<Tensor>());
      teacher->pack_kt();
    }
    const Tensor teacher_tiles = on_huge_pages(at::empty({taught && kept ? head.tiles() : 0}, head.sums));
    const Tensor taught_bias = head.vector(teacher_bias), known = contiguous(log_probs);
    const Tensor taken = at::empty({indices_ ? indices.numel() : 0}, head.sums);
    const int64_t rows = head.step() * kTileCols;
    const Tensor row_sums = at::empty({head.chunks * rows * static_cast<int64_t>(sizeof(RowSums<A>))}, at::kByte);
    const Tensor mixtures = at::empty({mixed ? head.chunks * 2 * rows : 0}, at::kDouble);
    const Tensor slopes = at::empty({LinearDistillation<P>::kSlopes, rows}, head.sums);
    const Divergence form = !taught   ? Divergence::none
                            : jsd     ? Divergence::jsd
                            : reverse ? Divergence::reverse_kl
                                      : Divergence::forward_kl;
    const LinearDistillation<P> g{student,
                                  data<A>(teacher_tiles),
                                  data<A>(taught_bias),
                                  form,
                                  hard_weight < 1 ? temperature : 1,
                                  beta,
                                  hard_weight,
                                  jsd,
                                  indices_ ? indices.size(1) : -1,
                                  data<int64_t>(indices),
                                  data<A>(known),
                                  data<A>(taken),
                                  data<RowSums<A>>(row_sums),
                                  data<double>(mixtures),
                                  data<A>(slopes)};
    const Pairs<Q> taught_pairs = teacher ? teacher->pairs : Pairs<Q>{};
    while (head.next()) {
      head.for_classes([&](int64_t chunk, int64_t jb, Scratch& scratch) {
        VLMK_CALL(linear_distillation_logits, g, taught_pairs, chunk, jb, scratch.take<A>(2 * kTileSize));
      });
      head.for_rows([&](int64_t jb) { VLMK_CALL(linear_distillation_rows, g, jb); });
      if (mixed) {
        head.for_classes([&](int64_t chunk, int64_t jb, Scratch&) { VLMK_CALL(linear_distillation_mix, g, chunk, jb); });
        head.for_rows([&](int64_t jb) { VLMK_CALL(linear_distillation_mixed_rows, g, jb); });
      }
      if (head.need_grad()) head.products([&](int64_t group) { VLMK_CALL(linear_distillation_gradients, g, group); });
    }
    return head.results(student_hidden, student_weight, student_bias);
  };
  return with_operand(dtype, [&](auto type) {
    using P = decltype(type);
    if constexpr (std::is_same_v<P, double>) {
      return run(type, double());
    } else {
      const bool half = teacher_hidden && teacher_hidden->scalar_type() == at::kBFloat16 && tile_product<bf16>();
      return half ? run(type, bf16()) : run(type, float());
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) { m.impl("linear_distillation_sweep", &linear_distillation_sweep); }

}  // namespace vlmk
