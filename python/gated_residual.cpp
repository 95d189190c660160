// vlmkernels::gated_residual and gated_residual_bwd for CPU tensors (contracts: vlmkernels/ops/gated_residual.py).
#include "vlmkernels/gated_residual.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "dtypes.h"
#include "gated_residual.h"
#include "memory.h"

namespace vlmk {
namespace {

using at::Tensor;
using std::optional;

// Of x in one task: a fixed number, so that sums do not depend on the threads.
constexpr int64_t kBlockElements = 1 << 15;

// tanh(gate) for each of d channels.
Tensor gates(const Tensor& gate, int64_t d, at::ScalarType type) {
  return gate.to(type).reshape({-1}).tanh().expand({d}).contiguous();
}

struct Shape {
  explicit Shape(const Tensor& x)
      : d(x.size(-1)),
        rows(d ? x.numel() / d : 0),
        block(std::max<int64_t>(kBlockElements / std::max<int64_t>(d, 1), 1)),
        blocks((rows + block - 1) / block) {}
  int64_t d, rows, block, blocks;
};

Tensor gated_residual(const Tensor& x_, const Tensor& y_, const Tensor& gate, const optional<Tensor>& row_mask) {
  need_gated_residual(Need("gated_residual"), "x", x_, y_, gate, row_mask);
  const auto dtype = c10::promoteTypes(x_.scalar_type(), y_.scalar_type());
  const Tensor x = x_.to(dtype).contiguous(), y = y_.to(dtype).contiguous();
  const Tensor out = on_huge_pages(at::empty(x.sizes(), x.options()));
  if (x.numel() == 0) return out;
  const Shape shape(x);
  const Tensor mask = row_mask ? row_mask->contiguous() : Tensor();
  with_storage(dtype, [&](auto type) {
    using T = decltype(type);
    const Tensor t = gates(gate, shape.d, sum_type(dtype));
    at::parallel_for(0, shape.blocks, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * shape.block, last = std::min(end * shape.block, shape.rows), offset = first * shape.d;
      VLMK_CALL(gated_residual, data<T>(x) + offset, data<T>(y) + offset, data<acc_t<T>>(t),
                mask.defined() ? data<bool>(mask) + first : nullptr, data<T>(out) + offset, last - first, shape.d);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> gated_residual_bwd(const Tensor& dout_, const Tensor& y_, const Tensor& gate,
                                              const optional<Tensor>& row_mask, std::array<bool, 2> needs) {
  const auto [need_y, need_gate] = needs;
  need_gated_residual(Need("gated_residual_bwd"), "dout", dout_, y_, gate, row_mask);
  const auto dtype = c10::promoteTypes(dout_.scalar_type(), y_.scalar_type());
  const auto sums = sum_type(dtype);
  const Tensor dout = dout_.to(dtype).contiguous(), y = y_.to(dtype).contiguous();
  const Tensor dy = on_huge_pages(at::empty(need_y ? y.sizes() : at::IntArrayRef{0}, y.options()));
  const Shape shape(y);
  const Tensor part = at::empty({need_gate ? shape.blocks : 0, shape.d}, y.options().dtype(at::kDouble));
  const Tensor t = gates(gate, shape.d, sums);
  const Tensor mask = row_mask ? row_mask->contiguous() : Tensor();
  Tensor dgate = at::empty({0}, gate.options());
  with_storage(dtype, [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    at::parallel_for(0, y.numel() && (need_y || need_gate) ? shape.blocks : 0, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * shape.block, last = std::min(first + shape.block, shape.rows), offset = first * shape.d;
        VLMK_CALL(gated_residual_bwd, data<T>(dout) + offset, data<T>(y) + offset, data<A>(t),
                  mask.defined() ? data<bool>(mask) + first : nullptr, need_y ? data<T>(dy) + offset : nullptr,
                  need_gate ? data<double>(part) + block * shape.d : nullptr, last - first, shape.d);
      }
    });
    if (!need_gate) return;
    // A channel's blocks are added in block order; the channels of a single gate in channel order.
    const Tensor total = at::empty({gate.numel()}, part.options().dtype(at::kDouble));
    total.zero_();
    const bool vector = gate.numel() == shape.d;
    const double* from = data<double>(part);
    double* to = data<double>(total);
    for (int64_t block = 0; block < shape.blocks; ++block) {
      for (int64_t c = 0; c < shape.d; ++c) to[vector ? c : 0] += from[block * shape.d + c];
    }
    const Tensor slope = gate.to(at::kDouble).reshape({-1}).tanh();
    dgate = ((1 - slope * slope) * total).to(gate.scalar_type()).reshape(gate.sizes());
  });
  return {dy.to(y_.scalar_type()), dgate};
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) {
  m.impl("gated_residual", &gated_residual);
  m.impl("gated_residual_bwd", &gated_residual_bwd);
}

}  // namespace vlmk
