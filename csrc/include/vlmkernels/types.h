#pragma once
#include <cstdint>

namespace vlmk {

// Storage of 16-bit floats; kernels compute in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Sums, logits and statistics over operands of type T.
template <class T>
struct acc {
  using type = float;
};
template <>
struct acc<double> {
  using type = double;
};
template <class T>
using acc_t = typename acc<T>::type;

}  // namespace vlmk
