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
void gated_residual_bwd(const T* dout, const T* y, const acc_t<T>* t, const bool* row_mask, T* dy, double* part, int64_t rows,
                        int64_t d) {
  using A = acc_t<T>;
  constexpr int64_t kCols = 1024;
  A sums[kCols];
  for (int64_t c = 0; part && c < d; ++c) part[c] = 0;
  for (int64_t r0 = 0; r0 < rows; r0 += kSumRows) {
    for (int64_t c0 = 0; c0 < d; c0 += kCols) {
      const int64_t cols = min_(kCols, d - c0);
      for (int64_t c = 0; part && c < cols; ++c) sums[c] = 0;
      for (int64_t r = r0; r < min_(r0 + kSumRows, rows); ++r) {
        const T *from = dout + r * d + c0, *branch = y + r * d + c0;
        const A* gate = t + c0;
        T* to = dy ? dy + r * d + c0 : nullptr;
        if (row_mask && !row_mask[r]) {
          for (int64_t c = 0; dy && c < cols; ++c) to[c] = T{};
        } else if (dy && part) {
#pragma omp simd
          for (int64_t c = 0; c < cols; ++c) {
            const A g = to_acc(from[c]);
            from_acc(gate[c] * g, to[c]);
            sums[c] += g * to_acc(branch[c]);
          }
        } else if (dy) {
#pragma omp simd
          for (int64_t c = 0; c < cols; ++c) from_acc(gate[c] * to_acc(from[c]), to[c]);
        } else {
#pragma omp simd
          for (int64_t c = 0; c < cols; ++c) sums[c] += to_acc(from[c]) * to_acc(branch[c]);
        }
      }
#pragma omp simd
      for (int64_t c = 0; c < (part ? cols : 0); ++c) part[c0 + c] += sums[c];
    }
  }
}

#define VLMK_INSTANTIATE(T)                                                                             \
  template void gated_residual(const T*, const T*, const acc_t<T>*, const bool*, T*, int64_t, int64_t); \
  template void gated_residual_bwd(const T*, const T*, const acc_t<T>*, const bool*, T*, double*, int64_t, int64_t);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)
VLMK_INSTANTIATE(f16)

}  // namespace vlmk::VLMK_ISA
