#pragma once
#include "vlmkernels/isa.h"
#include "vlmkernels/types.h"

namespace vlmk {

VLMK_PER_ISA(
    // out = x + t y on rows where the mask is true, x elsewhere; t = tanh(gate).
    template <class T> void gated_residual(const T* x,            // [rows, d]
                                           const T* y,            // [rows, d]
                                           const acc_t<T>* t,     // [d]
                                           const bool* row_mask,  // [rows] or null
                                           T* out,                // [rows, d]
                                           int64_t rows, int64_t d);
    // dy = t dout and part = sum over the rows of dout * y, 0 on masked rows; dy or part may be null.
    template <class T> void gated_residual_bwd(const T* dout,         // [rows, d]
                                               const T* y,            // [rows, d]
                                               const acc_t<T>* t,     // [d]
                                               const bool* row_mask,  // [rows] or null
                                               T* dy,                 // [rows, d]
                                               double* part,          // [d]
                                               int64_t rows, int64_t d);)

}  // namespace vlmk
