#pragma once
// Vectors of one register of the instruction set: wider ones (vector.h) go through memory where they have no register.
#include "simd.h"

namespace vlmk::VLMK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kRegisterBytes = 64;
#elif defined(__AVX__)
constexpr int64_t kRegisterBytes = 32;
#else
constexpr int64_t kRegisterBytes = 16;
#endif

template <class A>
struct Registers {
  static constexpr int64_t lanes = kRegisterBytes / sizeof(A);
  typedef A type __attribute__((vector_size(kRegisterBytes)));
};
template <class A>
using Register = typename Registers<A>::type;

template <class A>
VLMK_INLINE Register<A> from_memory(const A* from) {
  Register<A> x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

}  // namespace
}  // namespace vlmk::VLMK_ISA
