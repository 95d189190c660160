// Compiled without contraction: a product that is not rounded would move an IoU across the threshold.
#include "vlmkernels/nms.h"

#include "simd.h"

namespace vlmk::VLMK_ISA {
namespace {

constexpr int64_t kCompared = 64;  // kept boxes before any is looked at

template <class A>
struct Box {
  A x1, y1, x2, y2, area;
};

template <class A>
VLMK_INLINE Box<A> box_at(const NmsBoxes<A>& boxes, int64_t i) {
  const A* at = boxes.columns + i;
  const int64_t s = boxes.stride;
  return {at[0], at[s], at[2 * s], at[3 * s], at[4 * s]};
}

// A NaN in a corner is one in the area, so that it does not matter which of two numbers the comparisons take.
template <class A>
VLMK_INLINE bool overlap(const Box<A>& a, const Box<A>& b, A threshold) {
  const A x = max_(min_(a.x2, b.x2) - max_(a.x1, b.x1), A(0)), y = max_(min_(a.y2, b.y2) - max_(a.y1, b.y1), A(0));
  const A common = x * y;
  return common / (a.area + b.area - common) > threshold;
}

}  // namespace

template <class T>
void nms_columns(const T* boxes, const int64_t* order, int64_t count, const NmsBoxes<acc_t<T>>& to) {
  using A = acc_t<T>;
  for (int64_t i = 0; i < count; ++i) {
    const T* box = boxes + 4 * order[i];
    A* at = to.columns + i;
    for (int64_t c = 0; c < 4; ++c) at[c * to.stride] = to_acc(box[c]);
    at[4 * to.stride] = (at[2 * to.stride] - at[0]) * (at[3 * to.stride] - at[to.stride]);
  }
}

template <class A>
void nms_against(const NmsBoxes<A>& boxes, int64_t kept_from, int64_t kept_to, int64_t first, int64_t count, A threshold,
                 int32_t* gone) {
  for (int64_t j = 0; j < count; ++j) {
    const Box<A> box = box_at(boxes, first + j);
    int32_t any = 0;
    for (int64_t i0 = kept_from; !any && i0 < kept_to; i0 += kCompared) {
#pragma omp simd reduction(| : any)
      for (int64_t i = i0; i < min_(i0 + kCompared, kept_to); ++i) any |= overlap(box_at(boxes, i), box, threshold);
    }
    gone[j] = any;
  }
}

template <class A>
int64_t nms_among(const NmsBoxes<A>& boxes, int64_t kept_to, int64_t first, int64_t count, A threshold, int32_t* gone) {
  for (int64_t i = 0; i < count; ++i) {
    if (gone[i]) continue;
    const Box<A> box = box_at(boxes, first + i);
#pragma omp simd
    for (int64_t j = i + 1; j < count; ++j) gone[j] |= overlap(box, box_at(boxes, first + j), threshold);
    for (int64_t c = 0; c < 5; ++c) boxes.columns[c * boxes.stride + kept_to] = boxes.columns[c * boxes.stride + first + i];
    ++kept_to;
  }
  return kept_to;
}

#define VLMK_INSTANTIATE(T) template void nms_columns(const T*, const int64_t*, int64_t, const NmsBoxes<acc_t<T>>&);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)
VLMK_INSTANTIATE(f16)
#define VLMK_INSTANTIATE_SUMS(A)                                                                  \
  template void nms_against(const NmsBoxes<A>&, int64_t, int64_t, int64_t, int64_t, A, int32_t*); \
  template int64_t nms_among(const NmsBoxes<A>&, int64_t, int64_t, int64_t, A, int32_t*);
VLMK_INSTANTIATE_SUMS(float)
VLMK_INSTANTIATE_SUMS(double)

}  // namespace vlmk::VLMK_ISA
