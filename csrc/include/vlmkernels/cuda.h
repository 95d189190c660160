#pragma once
// Arguments of the launchers of csrc/cuda: device memory, and the stream that their kernels run on.
#include <cstdint>

namespace vlmk::cuda {

enum class DType : int32_t { f64, f32, bf16, f16 };

// [rows, d] with a row stride in elements; the elements of a row are contiguous.
struct Matrix {
  const void* data;
  DType type;
  int64_t stride;
};

struct Stream {
  int device;
  void* handle;  // a cudaStream_t
};

}  // namespace vlmk::cuda
