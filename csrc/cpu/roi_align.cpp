#include "vlmkernels/roi_align.h"

#include "registers.h"

namespace vlmk::VLMK_ISA {
namespace {

// f(c) for columns [0, span), in whole registers where they are.
template <class A, class F>
VLMK_INLINE void for_columns(int64_t span, F f) {
  constexpr int64_t lanes = Registers<A>::lanes;
  if (span % lanes == 0) {
    for (int64_t c0 = 0; c0 < span; c0 += lanes) {
#pragma omp simd
      for (int64_t c = 0; c < lanes; ++c) f(c0 + c);
    }
  } else {
    for (int64_t c = 0; c < span; ++c) f(c);
  }
}

template <class A, class T>
struct Buffers {
  Buffers(Scratch& scratch, const RoiOptions& by) : line(scratch.take<A>(by.width + 1)), beyond(scratch.take<T>(by.width)) {}
  A* line;    // a row of a bin's height, and 0 behind it
  T* beyond;  // the row of places beyond the others
};

}  // namespace

template <class T>
int64_t roi_align_scratch(const RoiOptions& by) {
  Scratch forward{nullptr}, backward{nullptr};
  Buffers<acc_t<T>, T>(forward, by), Buffers<acc_t<T>, acc_t<T>>(backward, by);
  return max_(forward.next - static_cast<char*>(nullptr), backward.next - static_cast<char*>(nullptr));
}

template <class T>
void roi_align(const T* plane, const RoiOptions& by, const RoiBox<acc_t<T>>* boxes, const int64_t* members, int64_t count,
               Scratch scratch, T* out, int64_t stride) {
  using A = acc_t<T>;
  const Buffers<A, T> buffers(scratch, by);
  A* line = buffers.line;
  for (int64_t c = 0; c < by.width; ++c) buffers.beyond[c] = T{};
  for (int64_t i = 0; i < count; ++i) {
    const RoiBox<A>& box = boxes[members[i]];
    T* to = out + members[i] * stride;
    const auto row_at = [&](int32_t row) { return row < 0 ? buffers.beyond : plane + row * by.width + box.left; };
    line[box.span] = 0;
    for (int64_t p = 0; p < by.h; ++p, to += by.w) {
      const int32_t* rows = box.rows + p * box.each_row;
      const A* weights = box.row_weights + p * box.each_row;
      for (int64_t r = 0; r < box.each_row; r += 2) {
        const T *x = row_at(rows[r]), *y = row_at(rows[r + 1]);
        const A a = weights[r], b = weights[r + 1];
        if (r == 0) {
          for_columns<A>(box.span, [&](int64_t c) { line[c] = a * to_acc(x[c]) + b * to_acc(y[c]); });
        } else {
          for_columns<A>(box.span, [&](int64_t c) { line[c] += a * to_acc(x[c]) + b * to_acc(y[c]); });
        }
      }
      const int32_t* cols = box.cols;
      const A* of_cols = box.col_weights;
      for (int64_t q = 0; q < by.w; ++q, cols += box.each_col, of_cols += box.each_col) {
        A even = 0, odd = 0;
        for (int64_t c = 0; c < box.each_col; c += 2) {
          even += of_cols[c] * line[cols[c]];
          odd += of_cols[c + 1] * line[cols[c + 1]];
        }
        from_acc((even + odd) * box.share, to[q]);
      }
    }
  }
}

template <class T>
void roi_align_bwd(const T* dout, int64_t stride, const RoiOptions& by, const RoiBox<acc_t<T>>* boxes, const int64_t* members,
                   int64_t count, Scratch scratch, acc_t<T>* sums, T* dplane) {
  using A = acc_t<T>;
  const Buffers<A, A> buffers(scratch, by);
  A* line = buffers.line;
  for (int64_t c = 0; c < by.width; ++c) buffers.beyond[c] = 0;
  for (int64_t c = 0; c < by.height * by.width; ++c) sums[c] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const RoiBox<A>& box = boxes[members[i]];
    const T* from = dout + members[i] * stride;
    for (int64_t p = 0; p < by.h; ++p, from += by.w) {
      for_columns<A>(box.span, [&](int64_t c) { line[c] = 0; });
      const int32_t* cols = box.cols;
      const A* of_cols = box.col_weights;
      for (int64_t q = 0; q < by.w; ++q, cols += box.each_col, of_cols += box.each_col) {
        const A g = to_acc(from[q]) * box.share;
        for (int64_t c = 0; c < box.each_col; ++c) line[cols[c]] += g * of_cols[c];
      }
      const int32_t* rows = box.rows + p * box.each_row;
      const A* weights = box.row_weights + p * box.each_row;
      for (int64_t r = 0; r < box.each_row; ++r) {
        A* row = rows[r] < 0 ? buffers.beyond : sums + rows[r] * by.width + box.left;
        const A weight = weights[r];
        for_columns<A>(box.span, [&](int64_t c) { row[c] += weight * line[c]; });
      }
    }
  }
  if constexpr (sizeof(T) < sizeof(A)) {
#pragma omp simd
    for (int64_t c = 0; c < by.height * by.width; ++c) from_acc(sums[c], dplane[c]);
  }
}

#define VLMK_INSTANTIATE(T)                                                                                                    \
  template int64_t roi_align_scratch<T>(const RoiOptions&);                                                                    \
  template void roi_align(const T*, const RoiOptions&, const RoiBox<acc_t<T>>*, const int64_t*, int64_t, Scratch, T*,          \
                          int64_t);                                                                                            \
  template void roi_align_bwd(const T*, int64_t, const RoiOptions&, const RoiBox<acc_t<T>>*, const int64_t*, int64_t, Scratch, \
                              acc_t<T>*, T*);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)
VLMK_INSTANTIATE(f16)

}  // namespace vlmk::VLMK_ISA
