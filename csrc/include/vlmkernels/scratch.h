#pragma once
#include <cstdint>

namespace vlmk {

// Hands out memory piece by piece, each from a cache line of its own on; from a null pointer it measures.
struct Scratch {
  char* next;
  // Inlined always: what is compiled for one instruction set must not run on another.
  template <class T>
  inline __attribute__((always_inline)) T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next);
    next += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};

}  // namespace vlmk
