#include "vlmkernels/gated_residual.h"

#include "simd.h"

namespace vlmk::VLMK_ISA {

template <class T>
void gated_residual(const T* x, const T* y, const acc_t<T>* t, const bool* row_mask, T* out, int64_t rows, int64_t d) {
  for (int64_t r = 0; r < rows; ++r, x += d, y += d, out += d) {
    if (row_mask && !row_mask[r]) {
      for (int64_t c = 0; c < d; ++c) out[c] = x[c];
      continue;
    }
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) from_acc(to_acc(x[c]) + t[c] * to_acc(y[c]), out[c]);
  }
}

template <class T>
void gated_residual_bwd(const T* dout, const T* y, const acc_t<T>* t, const bool* row_mask, T* dy, acc_t<T>* part, int64_t rows,
                        int64_t d) {
  for (int64_t c = 0; part && c < d; ++c) part[c] = 0;
  for (int64_t r = 0; r < rows; ++r, dout += d, y += d) {
    const bool keep = !row_mask || row_mask[r];
    T* dy_row = dy ? dy + r * d : nullptr;
    if (!keep) {
      for (int64_t c = 0; dy && c < d; ++c) dy_row[c] = T{};
    } else if (dy && part) {
#pragma omp simd
      for (int64_t c = 0; c < d; ++c) {
        const acc_t<T> g = to_acc(dout[c]);
        from_acc(t[c] * g, dy_row[c]);
        part[c] += g * to_acc(y[c]);
      }
    } else if (dy) {
#pragma omp simd
      for (int64_t c = 0; c < d; ++c) from_acc(t[c] * to_acc(dout[c]), dy_row[c]);
    } else {
#pragma omp simd
      for (int64_t c = 0; c < d; ++c) part[c] += to_acc(dout[c]) * to_acc(y[c]);
    }
  }
}

#define VLMK_INSTANTIATE(T)                                                                             \
  template void gated_residual(const T*, const T*, const acc_t<T>*, const bool*, T*, int64_t, int64_t); \
  template void gated_residual_bwd(const T*, const T*, const acc_t<T>*, const bool*, T*, acc_t<T>*, int64_t, int64_t);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)
VLMK_INSTANTIATE(f16)

}  // namespace vlmk::VLMK_ISA
