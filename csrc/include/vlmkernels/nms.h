#pragma once
#include "vlmkernels/isa.h"
#include "vlmkernels/types.h"

namespace vlmk {

// Columns x1, y1, x2, y2 and area of boxes, `stride` apart.
template <class A>
struct NmsBoxes {
  A* columns;  // [5][stride]
  int64_t stride;
};

VLMK_PER_ISA(
    // Boxes in an order.
    template <class T> void nms_columns(const T* boxes,        // [N, 4]
                                        const int64_t* order,  // [count]
                                        int64_t count, const NmsBoxes<acc_t<T>>& to);
    // gone[j] = whether the IoU of box first + j, j < count, with one of the boxes [kept_from, kept_to) is above the threshold.
    template <class A> void nms_against(const NmsBoxes<A>& boxes, int64_t kept_from, int64_t kept_to, int64_t first,
                                        int64_t count, A threshold, int32_t* gone);
    // The same among these boxes, in their order, which skips those that are gone. Those that stay are moved to kept_to, ...
    // Returns where they end.
    template <class A>
    int64_t nms_among(const NmsBoxes<A>& boxes, int64_t kept_to, int64_t first, int64_t count, A threshold, int32_t* gone);)

}  // namespace vlmk
