#pragma once
// Which C++ type stands for which dtype; the list is closed.
#include <ATen/core/Tensor.h>

#include "vlmkernels/types.h"

namespace vlmk {

[[noreturn]] inline void no_kernel(at::ScalarType dtype) {
  C10_THROW_ERROR(ValueError, c10::str("there are kernels for float32, float64, bfloat16 and float16, not for ", dtype));
}

inline at::ScalarType sum_type(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// Calls f with a value of the type that numbers of this dtype are stored in.
template <class F>
auto with_storage(at::ScalarType dtype, F f) {
  switch (dtype) {
    case at::kDouble:
      return f(double());
    case at::kFloat:
      return f(float());
    case at::kBFloat16:
      return f(bf16());
    case at::kHalf:
      return f(f16());
    default:
      no_kernel(dtype);
  }
}

}  // namespace vlmk
