#pragma once
// Memory of large results and buffers.
#include <ATen/core/Tensor.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace vlmk {

// Large buffers that are written once: fewer page faults where the system gives huge pages on request.
inline at::Tensor on_huge_pages(at::Tensor t) {
#ifdef __linux__
  constexpr uintptr_t huge = uintptr_t(1) << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr()), end = begin + t.nbytes();
  const uintptr_t first = (begin + huge - 1) / huge * huge;
  if (end > first + huge) madvise(reinterpret_cast<void*>(first), (end - first) / huge * huge, MADV_HUGEPAGE);
#endif
  return t;
}

}  // namespace vlmk
