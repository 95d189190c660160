// vlmkernels::nms for CPU tensors (contract: vlmkernels/ops/nms.py).
#include "vlmkernels/nms.h"

#include <ATen/ops/argsort.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "bridge.h"

namespace vlmk {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kBlock = 256;  // boxes that are compared with all that are kept before they are among themselves
constexpr int64_t kTask = 16;    // of them in one task

// The largest number of A that is not above x: comparing numbers of A with either gives the same.
template <class A>
A rounded_down(double x) {
  const A near = static_cast<A>(x);
  return near > x ? std::nextafter(near, -std::numeric_limits<A>::infinity()) : near;
}

// Suppression among the boxes [begin, end) of one group.
template <class A>
void suppress(const NmsBoxes<A>& boxes, int64_t begin, int64_t end, A threshold, int32_t* gone) {
  int64_t kept = begin;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min(kBlock, end - first);
    const auto against = [&](int64_t from, int64_t to) {
      VLMK_CALL(nms_against, boxes, begin, kept, first + from, to - from, threshold, gone + first + from);
    };
    at::parallel_for(0, count, kept == begin ? count : kTask, against);
    kept = VLMK_CALL(nms_among, boxes, kept, first, count, threshold, gone + first);
  }
}

Tensor nms(const Tensor& boxes_, const Tensor& scores, const optional<Tensor>& groups_, double iou_threshold) {
  const Need need("nms");
  need.tensor("boxes", boxes_, {kAny, 4}, kFloats);
  const int64_t n = boxes_.size(0);
  need.countable(boxes_.sizes());
  need.tensor("scores", scores, n, kFloats);
  need.tensor("groups", groups_, n, kInts);
  need.that(iou_threshold >= 0 && iou_threshold <= 1, "iou_threshold must be in [0, 1], got ", iou_threshold);
  const Tensor boxes = boxes_.contiguous();
  const Tensor order = at::argsort(scores.neg(), true, 0, false);  // NaN is above every number for torch
  const int64_t* by_score = data<int64_t>(order);
  Tensor places, groups, grouped = order;  // boxes by group, each by score; where they are in the order
  if (groups_) {
    const Tensor of_order = groups_->index_select(0, order).to(at::kLong);
    places = at::argsort(of_order, true, 0, false);
    groups = of_order.index_select(0, places);
    grouped = order.index_select(0, places);
  }
  const Tensor gone = at::empty({n}, order.options().dtype(at::kInt));
  int32_t* is_gone = data<int32_t>(gone);
  with_storage(boxes.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    const Tensor columns = at::empty({5, n}, boxes.options().dtype(sum_type(boxes.scalar_type())));
    const NmsBoxes<A> of{data<A>(columns), n};
    VLMK_CALL(nms_columns, data<T>(boxes), data<int64_t>(grouped), n, of);
    const int64_t* group = data<int64_t>(groups);
    for (int64_t begin = 0, end; begin < n; begin = end) {
      for (end = begin + 1; end < n && (!group || group[end] == group[begin]);) ++end;
      suppress(of, begin, end, rounded_down<A>(iou_threshold), is_gone);
    }
  });
  const Tensor stays = at::empty({n}, order.options().dtype(at::kBool));
  bool* stay = data<bool>(stays);
  const int64_t* place = data<int64_t>(places);
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    stay[place ? place[i] : i] = !is_gone[i];
    count += !is_gone[i];
  }
  const Tensor kept = at::empty({count}, order.options());
  int64_t* to = data<int64_t>(kept);
  for (int64_t i = 0; i < n; ++i) {
    if (stay[i]) *to++ = by_score[i];
  }
  return kept;
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) { m.impl("nms", &nms); }

}  // namespace vlmk
