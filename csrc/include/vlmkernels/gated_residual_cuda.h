#pragma once
#include "vlmkernels/cuda.h"

namespace vlmk::cuda {

struct Gate {
  const void* data;  // [d] or [1]
  DType type;
  bool per_channel;
};

// Whether there are kernels for operands of these types: equal ones, or float and a 16-bit branch.
bool gated_residual_takes(DType x, DType y);

// out = x + tanh(gate) y on rows where the mask is true, x elsewhere. Returns null, or the error of the launch.
const char* gated_residual(Matrix x,              // [rows, d]
                           Matrix y,              // [rows, d]
                           Gate gate,             // [d] or [1]
                           const bool* row_mask,  // [rows] or null
                           void* out,             // [rows, d] of the type of x
                           int64_t rows, int64_t d, Stream stream);

// Number of scratch elements that the gradient of the gate needs.
int64_t gated_residual_bwd_scratch(Matrix dout, Matrix y, Gate gate, const void* dy, int64_t rows, int64_t d);

// dy = t dout and dgate = (1 - t^2) sum of dout y over the rows where the mask is true (and over the channels for a single
// gate), t = tanh(gate); dy is 0 on other rows. dy or dgate may be null.
const char* gated_residual_bwd(Matrix dout,           // [rows, d]
                               Matrix y,              // [rows, d]
                               Gate gate,             // [d] or [1]
                               const bool* row_mask,  // [rows] or null
                               void* dy,              // [rows, d] of the type of y, or null
                               void* dgate,           // as the gate, or null
                               double* scratch,       // [gated_residual_bwd_scratch], or null without dgate
                               int64_t rows, int64_t d, Stream stream);

}  // namespace vlmk::cuda
