#pragma once
#include "vlmkernels/isa.h"
#include "vlmkernels/types.h"

namespace vlmk {

// Operands of a slice of rows. Levels lie `stride` elements apart; so do those of the results.
template <class T>
struct SrauInputs {
  const T* language;     // [rows, d]
  const T* visual;       // [levels, rows, d]
  const T* gate_logits;  // [levels, rows, d]
  const bool* row_mask;  // [rows] or null
  int64_t rows, d, levels, stride;
  double tau;
  bool negated;  // the logits are
};

VLMK_PER_ISA(
    // out = sum_l (a_l language + b_l visual_l) / sqrt(levels), 0 on masked rows: with alpha the sigmoid of the logits,
    // a = alpha [alpha > tau] and b = (1 - alpha) [alpha < 1 - tau].
    template <class T> void srau(const SrauInputs<T>& in,
                                 T* out);  // [rows, d]
    // The gradients, of which any may be null, 0 on masked rows.
    template <class T> void srau_bwd(const T* dout,  // [rows, d]
                                     const SrauInputs<T>& in,
                                     T* dlanguage,      // [rows, d]
                                     T* dvisual,        // [levels, rows, d]
                                     T* dgate_logits);  // [levels, rows, d]
)

}  // namespace vlmk
