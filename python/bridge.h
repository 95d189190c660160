#pragma once
// What every op on a CPU needs: pointers and dtypes of tensors, scratch memory, the loop over tasks, and packed operands.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>

#include "dtypes.h"
#include "memory.h"
#include "need.h"
#include "tile_gemm.h"
#include "vlmkernels/pack.h"
#include "vlmkernels/scratch.h"

namespace vlmk {

template <class P>
constexpr at::ScalarType scalar_type() {
  return sizeof(P) == 2 ? at::kBFloat16 : sizeof(P) == 4 ? at::kFloat : at::kDouble;
}

// Without features a product has no terms: one feature of zeros is the same.
inline at::Tensor with_width(const at::Tensor& x) { return x.size(-1) ? x : at::constant_pad_nd(x, {0, 1}); }

inline at::Tensor contiguous(const std::optional<at::Tensor>& t) { return t ? t->contiguous() : at::Tensor(); }

// The only element of a tensor, infinite where it leaves the range of A.
template <class A>
A number(const at::Tensor& t) {
  return static_cast<A>(t.item().toDouble());
}

// Calls f with a value of the operand type for features of this dtype: float16, and bfloat16 where the CPU has no product for
// it, are widened to float.
template <class F>
auto with_operand(at::ScalarType dtype, F f) {
  if (dtype == at::kDouble) return f(double());
  if (dtype == at::kBFloat16 && tile_product<bf16>()) return f(bf16());
  if (!kFloats.has(dtype)) no_kernel(dtype);
  return f(float());
}

// Memory of a Scratch.
using Memory = std::unique_ptr<char, void (*)(void*)>;
inline Memory memory_of(int64_t bytes) {
  Memory memory(static_cast<char*>(std::aligned_alloc(64, round_up(bytes, 64) + 64)), std::free);
  if (!memory) throw std::bad_alloc();
  return memory;
}

// Runs f(task, scratch) for tasks [0, count) over torch's threads, each with its own scratch memory. A thread that is done
// takes the next task: neither tasks of unequal size nor a core that others use as well leave the other threads waiting.
template <class F>
void for_tasks(int64_t count, int64_t scratch_bytes, F f) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t begin, int64_t end) {
    struct Release {
      ~Release() { tile_product_release(); }
    } release;
    thread_local Memory memory = memory_of(0);
    thread_local int64_t size = 0;
    if (size < scratch_bytes) memory = memory_of(scratch_bytes), size = scratch_bytes;
    for (int64_t task; (task = next++) < count;) {
      Scratch scratch{memory.get()};
      f(task, scratch);
    }
  });
}

// x [rows, d] in blocks of `width` rows, each written by pack(x, ldx, rows, d, depth, width, out).
template <class P, class Pack>
at::Tensor packed(const at::Tensor& x, int64_t width, Pack pack) {
  const int64_t rows = x.size(0), d = x.size(1), depth = depth_of<P>(d), blocks = ceil_div(rows, width);
  const at::Tensor out = on_huge_pages(at::empty({blocks * depth * width}, x.options()));
  for_tasks(blocks, 0, [&](int64_t block, Scratch&) {
    const int64_t first = block * width;
    pack(data<P>(x) + first * d, d, std::min(width, rows - first), d, depth, width, data<P>(out) + first * depth);
  });
  return out;
}

// As B operand of the product with its transpose: see pack_transposed_b.
template <class P>
at::Tensor pack_transposed(const at::Tensor& x, int64_t width) {
  return packed<P>(x, width, [](auto... block) { VLMK_CALL(pack_transposed_b, block...); });
}

// As B operand of a product that sums over its rows: for bf16 see pack_rows_b, else x itself.
template <class P>
at::Tensor pack_rows(const at::Tensor& x, int64_t width) {
  if constexpr (sizeof(P) == 2) {
    return packed<P>(x, width, [](auto... block) { VLMK_CALL(pack_rows_b, block...); });
  }
  return x;
}

}  // namespace vlmk
