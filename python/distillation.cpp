// vlmkernels::distillation and distillation_bwd for CPU tensors (contracts: vlmkernels/ops/distillation.py).
#include "vlmkernels/distillation.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <cmath>
#include <string_view>

#include "bridge.h"

namespace vlmk {
namespace {

using at::Tensor;
using std::optional;

// Classes of all rows of one task: a fixed number.
constexpr int64_t kTaskClasses = 1 << 15;

struct Options {
  double temperature;
  std::string_view divergence;
  double beta, hard_weight;
  int64_t ignore_index;
  std::string_view reduction;

  bool per_row() const { return reduction == "none"; }
  bool mean() const { return reduction == "mean" || reduction == "batchmean"; }
};

Divergence divergence_of(const Need& need, const Options& o) {
  need.that(o.divergence == "forward_kl" || o.divergence == "reverse_kl" || o.divergence == "jsd",
            "divergence must be 'forward_kl', 'reverse_kl' or 'jsd', got '", o.divergence, "'");
  if (o.hard_weight == 1) return Divergence::none;
  return o.divergence == "jsd"          ? Divergence::jsd
         : o.divergence == "forward_kl" ? Divergence::forward_kl
                                        : Divergence::reverse_kl;
}

// A call's arguments, checked; tensors with the dtype of the kernel and rows without gaps within them.
struct DistillationCall {
  DistillationCall(const char* op, const Tensor& student_, const Tensor& teacher_, const optional<Tensor>& target_,
                   const Options& options)
      : o(options) {
    const Need need(op);
    divergence = divergence_of(need, o);
    need.tensor("student_logits", student_, {kAny, kAny}, kFloats);
    need.tensor("teacher_logits", teacher_, student_.sizes(), kFloats);
    rows = student_.size(0), classes = student_.size(1);
    need.tensor("target", target_, {rows}, at::kLong);
    need.countable({rows, classes});
    need.that(o.temperature > 0 && std::isfinite(o.temperature), "temperature must be positive and finite, got ",
              o.temperature);
    need.that(o.beta > 0 && o.beta < 1, "beta must be in (0, 1), got ", o.beta);
    need.that(o.hard_weight >= 0 && o.hard_weight <= 1, "hard_weight must be in [0, 1], got ", o.hard_weight);
    need.that(o.hard_weight == 0 || target_, "target must be given with hard_weight ", o.hard_weight);
    need.that(o.per_row() || o.mean() || o.reduction == "sum", "reduction must be 'batchmean', 'mean', 'sum' or 'none', got '",
              o.reduction, "'");
    dtype = c10::promoteTypes(student_.scalar_type(), teacher_.scalar_type());
    student = with_plain_rows(student_), teacher = with_plain_rows(teacher_), target = contiguous(target_);
    counted = rows;
    const int64_t* index = data<int64_t>(target);
    for (int64_t i = 0; index && i < rows; ++i) {
      const bool ignored = index[i] == o.ignore_index;
      TORCH_CHECK_INDEX(ignored || (index[i] >= 0 && index[i] < classes), op, ": target must be in [0, V = ", classes, ") or ",
                        o.ignore_index, ", got ", index[i]);
      counted -= ignored;
    }
  }

  template <class T>
  Distillation<T> kernel(const Tensor& stats) const {
    const double temperature = divergence == Divergence::none ? 1 : o.temperature;
    return {data<T>(student),      data<T>(teacher), data<int64_t>(target),
            data<acc_t<T>>(stats), classes,          student.stride(0),
            teacher.stride(0),     o.ignore_index,   divergence,
            temperature,           o.beta,           o.hard_weight};
  }
  // f(first, last, scratch) for all rows.
  template <class F>
  void for_rows(int64_t scratch_bytes, F f) const {
    const int64_t block = std::max<int64_t>(kTaskClasses / std::max<int64_t>(classes, 1), 1);
    for_tasks(ceil_div(rows, block), scratch_bytes,
              [&](int64_t task, Scratch& scratch) { f(task * block, std::min((task + 1) * block, rows), scratch); });
  }
  double share() const { return o.mean() ? 1.0 / static_cast<double>(std::max<int64_t>(counted, 1)) : 1.0; }

  const Options o;
  Divergence divergence;
  int64_t rows, classes, counted;
  at::ScalarType dtype;
  Tensor student, teacher, target;

 private:
  Tensor with_plain_rows(const Tensor& x) const {
    const Tensor same = x.to(dtype);
    return same.stride(1) == 1 || classes < 2 ? same : same.contiguous();
  }
};

auto distillation(const Tensor& student, const Tensor& teacher, const optional<Tensor>& target, double temperature,
                  std::string_view divergence, double beta, double hard_weight, int64_t ignore_index,
                  std::string_view reduction, bool need_student) {
  const DistillationCall call("distillation", student, teacher, target,
                              {temperature, divergence, beta, hard_weight, ignore_index, reduction});
  const auto options = student.options().dtype(sum_type(call.dtype));
  const Tensor losses = at::empty({call.rows}, options), stats = at::empty({call.rows, Distillation<float>::kStats}, options);
  const Tensor dstudent = new_gradient(call.student, need_student);
  Tensor loss = losses;
  with_storage(call.dtype, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    const Distillation<T> g = call.kernel<T>(stats);
    if (dstudent.numel() > 0) {
      Scratch measured{nullptr};
      KeptRow<A>(measured, call.classes);
      call.for_rows(reinterpret_cast<intptr_t>(measured.next), [&](int64_t first, int64_t last, Scratch& scratch) {
        const KeptRow<A> kept(scratch, call.classes);
        VLMK_CALL(distillation_formed, g, first, last, data<A>(losses), call.share(), data<T>(dstudent), kept);
      });
    } else {
      call.for_rows(0,
                    [&](int64_t first, int64_t last, Scratch&) { VLMK_CALL(distillation, g, first, last, data<A>(losses)); });
    }
    if (call.o.per_row()) return;
    double sum = 0;
    for (int64_t i = 0; i < call.rows; ++i) sum += data<A>(losses)[i];
    loss = at::empty({}, options);
    *data<A>(loss) = static_cast<A>(sum * call.share());
  });
  return std::make_tuple(loss, stats, dstudent.to(student.scalar_type()));
}

Tensor distillation_bwd(const Tensor& dloss_, const Tensor& student, const Tensor& teacher, const optional<Tensor>& target,
                        const Tensor& stats_, double temperature, std::string_view divergence, double beta, double hard_weight,
                        int64_t ignore_index, std::string_view reduction, std::array<bool, 1> needs) {
  const Need need("distillation_bwd");
  const DistillationCall call("distillation_bwd", student, teacher, target,
                              {temperature, divergence, beta, hard_weight, ignore_index, reduction});
  const auto sums = sum_type(call.dtype);
  need.tensor("stats", stats_, {call.rows, Distillation<float>::kStats}, sums);
  need.tensor("dloss", dloss_, call.o.per_row() ? at::IntArrayRef(call.rows) : at::IntArrayRef(), kFloats);
  const Tensor dloss = dloss_.to(sums).contiguous(), stats = stats_.contiguous();
  const Tensor dstudent = new_gradient(call.student, needs[0]);
  if (dstudent.numel() == 0) return dstudent.to(student.scalar_type());
  with_storage(call.dtype, [&](auto type) {
    using T = decltype(type);
    const Distillation<T> g = call.kernel<T>(stats);
    call.for_rows(0, [&](int64_t first, int64_t last, Scratch&) {
      VLMK_CALL(distillation_bwd, g, first, last, data<acc_t<T>>(dloss), !call.o.per_row(), call.share(), data<T>(dstudent));
    });
  });
  return dstudent.to(student.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) {
  m.impl("distillation", &distillation);
  m.impl("distillation_bwd", &distillation_bwd);
}

}  // namespace vlmk
