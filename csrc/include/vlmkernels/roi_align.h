#pragma once
#include "vlmkernels/isa.h"
#include "vlmkernels/scratch.h"
#include "vlmkernels/types.h"

namespace vlmk {

// One call: pictures of height x width pixels, boxes of h x w bins.
struct RoiOptions {
  int64_t height, width, h, w;
  double spatial_scale;
  int64_t sampling_ratio;  // 0: adaptive
  bool aligned;
};

// The rows and columns of a picture that the bins of a box average, and their weights: as many for each bin, the rest with the
// weight 0 and a place beyond the others.
template <class A>
struct RoiBox {
  int32_t* rows;   // [h][each_row], in the picture, or -1
  A* row_weights;  // [h][each_row]
  int32_t* cols;   // [w][each_col], from `left` on, or `span`
  A* col_weights;  // [w][each_col]
  int64_t each_row, each_col;
  int64_t left, span;  // the columns of all bins are in [left, left + span)
  A share;             // of a sample in a bin
};

VLMK_PER_ISA(
    // Everything but what the pointers point to.
    template <class A> void roi_align_measure(const A* corners,  // [4]: x1, y1, x2, y2
                                              const RoiOptions&, RoiBox<A>* box);
    // What they point to.
    template <class A> void roi_align_fill(const A* corners, const RoiOptions&, const RoiBox<A>& box);
    // out[k] = sum over rows and columns of their weights times the plane, for the boxes k in `members`.
    template <class T>
    void roi_align(const T* plane,  // [height, width]
                   const RoiOptions&, const RoiBox<acc_t<T>>* boxes,
                   const int64_t* members,                                   // [count]
                   int64_t count, Scratch scratch, T* out, int64_t stride);  // [h, w], of box k at k * stride
    // The gradient of the plane, of the boxes in `members` in their order. `sums` is dplane or memory of its size.
    template <class T> void roi_align_bwd(const T* dout, int64_t stride,  // as out
                                          const RoiOptions&, const RoiBox<acc_t<T>>* boxes,
                                          const int64_t* members,  // [count]
                                          int64_t count, Scratch scratch,
                                          acc_t<T>* sums,  // [height, width]
                                          T* dplane);      // [height, width]
    // Bytes of their scratch memory.
    template <class T> int64_t roi_align_scratch(const RoiOptions&);)

}  // namespace vlmk
