#pragma once
// What a launcher of csrc/cuda takes: memory of the device and the stream its kernels are put on.
#include <cstdint>

namespace vlmk::cuda {

enum class DType : int32_t { f64, f32, bf16, f16 };

// [rows, d]: rows `stride` elements apart, the elements of a row side by side.
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
