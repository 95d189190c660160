// vlmkernels::embedding_distillation and its backward for CPU tensors (contracts: vlmkernels/ops/embedding_distillation.py).
#include "vlmkernels/embedding_distillation.h"

#include <torch/library.h>

#include <string_view>

#include "bridge.h"

namespace vlmk {
namespace {

using at::Tensor;
using std::optional;

// Features of all rows of one task: a fixed number.
constexpr int64_t kTaskFeatures = 1 << 15;

Distance distance_of(const Need& need, std::string_view name) {
  if (name == "l1") return Distance::l1;
  if (name == "l2") return Distance::l2;
  if (name == "cosine") return Distance::cosine;
  if (name == "smooth_l1") return Distance::smooth_l1;
  need.refuse("distance must be 'l1', 'l2', 'cosine' or 'smooth_l1', got '", name, "'");
}

// A call's arguments, checked; tensors contiguous and with the dtype of the kernel.
struct EmbeddingCall {
  EmbeddingCall(const Need& need, const Tensor& student_, const Tensor& teacher_, const optional<Tensor>& weight_,
                std::string_view name, bool normalize_, std::string_view reduction)
      : distance(distance_of(need, name)), normalize(normalize_ || distance == Distance::cosine), per_row(reduction == "none") {
    need.tensor("student", student_, {kAny, kAny}, kFloats);
    need.tensor("teacher", teacher_, student_.sizes(), kFloats);
    rows = student_.size(0), d = student_.size(1);
    need.tensor("weight", weight_, {rows}, kFloats);
    need.countable({rows, d});
    need.that(per_row || reduction == "mean" || reduction == "sum", "reduction must be 'mean', 'sum' or 'none', got '",
              reduction, "'");
    dtype = c10::promoteTypes(student_.scalar_type(), teacher_.scalar_type());
    student = student_.to(dtype).contiguous(), teacher = teacher_.to(dtype).contiguous();
    if (weight_) weight = weight_->to(sum_type(dtype)).contiguous();
    if (reduction == "mean") share = total() != 0 ? 1 / total() : 0;
  }

  template <class T>
  EmbeddingDistillation<T> kernel() const {
    return {data<T>(student), data<T>(teacher), data<acc_t<T>>(weight), d, distance, normalize};
  }
  // f(first, last) for all rows.
  template <class F>
  void for_rows(F f) const {
    const int64_t block = std::max<int64_t>(kTaskFeatures / std::max<int64_t>(d, 1), 1);
    for_tasks(ceil_div(rows, block), 0, [&](int64_t task, Scratch&) { f(task * block, std::min((task + 1) * block, rows)); });
  }

  Distance distance;
  bool normalize, per_row;
  int64_t rows, d;
  at::ScalarType dtype;
  Tensor student, teacher, weight;
  double share = 1;

 private:
  double total() const {
    if (!weight.defined()) return static_cast<double>(rows);
    double sum = 0;
    with_storage(weight.scalar_type(), [&](auto type) {
      using A = decltype(type);
      if constexpr (sizeof(A) > 2) {
        for (int64_t i = 0; i < rows; ++i) sum += data<A>(weight)[i];
      }
    });
    return sum;
  }
};

auto embedding_distillation(const Tensor& student, const Tensor& teacher, const optional<Tensor>& weight,
                            std::string_view distance, bool normalize, std::string_view reduction, bool need_student) {
  const EmbeddingCall call(Need("embedding_distillation"), student, teacher, weight, distance, normalize, reduction);
  const auto options = student.options().dtype(sum_type(call.dtype));
  const Tensor losses = at::empty({call.rows}, options), dstudent = new_gradient(call.student, need_student);
  Tensor loss = losses;
  with_storage(call.dtype, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    const EmbeddingDistillation<T> g = call.kernel<T>();
    call.for_rows([&](int64_t first, int64_t last) {
      VLMK_CALL(embedding_distillation, g, first, last, data<A>(losses), call.share,
                dstudent.numel() > 0 ? data<T>(dstudent) : nullptr);
    });
    if (call.per_row) return;
    double sum = 0;
    for (int64_t i = 0; i < call.rows; ++i) sum += data<A>(losses)[i];
    loss = at::empty({}, options);
    *data<A>(loss) = static_cast<A>(sum * call.share);
  });
  return std::make_tuple(loss, dstudent.to(student.scalar_type()));
}

Tensor embedding_distillation_bwd(const Tensor& dloss_, const Tensor& student, const Tensor& teacher,
                                  const optional<Tensor>& weight, std::string_view distance, bool normalize,
                                  std::string_view reduction, std::array<bool, 1> needs) {
  const Need need("embedding_distillation_bwd");
  const EmbeddingCall call(need, student, teacher, weight, distance, normalize, reduction);
  need.tensor("dloss", dloss_, call.per_row ? at::IntArrayRef(call.rows) : at::IntArrayRef(), kFloats);
  const Tensor dloss = dloss_.to(sum_type(call.dtype)).contiguous();
  const Tensor dstudent = new_gradient(call.student, needs[0]);
  if (dstudent.numel() == 0) return dstudent.to(student.scalar_type());
  with_storage(call.dtype, [&](auto type) {
    using T = decltype(type);
    const EmbeddingDistillation<T> g = call.kernel<T>();
    call.for_rows([&](int64_t first, int64_t last) {
      VLMK_CALL(embedding_distillation_bwd, g, first, last, data<acc_t<T>>(dloss), !call.per_row, call.share,
                data<T>(dstudent));
    });
  });
  return dstudent.to(student.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) {
  m.impl("embedding_distillation", &embedding_distillation);
  m.impl("embedding_distillation_bwd", &embedding_distillation_bwd);
}

}  // namespace vlmk
