#pragma once
// Memory of large results and buffers.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <optional>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace vlmk {

// nullptr where there is nothing.
template <class P>
P* data(const at::Tensor& t) {
  return t.defined() && t.numel() ? static_cast<P*>(t.data_ptr()) : nullptr;
}
template <class P>
P* data(const std::optional<at::Tensor>& t) {
  return t ? data<P>(*t) : nullptr;
}

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

// Of x, empty where it is not needed.
inline at::Tensor new_gradient(const at::Tensor& x, bool need) {
  return on_huge_pages(at::empty(need ? x.sizes() : at::IntArrayRef{0}, x.options()));
}

}  // namespace vlmk
