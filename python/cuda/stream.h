// Where the kernels of a call go.
#pragma once
#include <ATen/core/Tensor.h>

#include "vlmkernels/cuda.h"

namespace vlmk {

// torch's current stream on the device of x.
cuda::Stream current_stream(const at::Tensor& x);

}  // namespace vlmk
