// vlmkernels::gated_residual and gated_residual_bwd for CUDA tensors (contracts: vlmkernels/ops/gated_residual.py).
#include "../gated_residual.h"

#include <ATen/TensorUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <array>
#include <optional>

#include "stream.h"
#include "vlmkernels/gated_residual_cuda.h"

namespace vlmk {
namespace {

using at::Tensor;
using std::optional;

cuda::DType type_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return cuda::DType::f64;
    case at::kFloat:
      return cuda::DType::f32;
    case at::kBFloat16:
      return cuda::DType::bf16;
    case at::kHalf:
      return cuda::DType::f16;
    default:
      C10_THROW_ERROR(ValueError, c10::str("gated_residual: there is no kernel for ", dtype));
  }
}

// x [..., D] as rows at one distance; a copy where it has none.
struct Operand {
  explicit Operand(const Tensor& x) : tensor(x), d(x.size(-1)), rows(x.numel() / d), stride(d) {
    const std::array<int64_t, 2> shape{rows, d};
    const auto strides = at::detail::computeStride(x.sizes(), x.strides(), at::IntArrayRef(shape));
    if (!strides || (d > 1 && (*strides)[1] != 1)) {
      tensor = x.contiguous();
    } else if (rows > 1) {
      stride = (*strides)[0];
    }
  }
  cuda::Matrix matrix() const { return {tensor.const_data_ptr(), type_of(tensor.scalar_type()), stride}; }
  Tensor tensor;
  int64_t d, rows, stride;
};

// The branch in a dtype that there are kernels for beside a residual of `dtype`.
Tensor branch(const Tensor& y, at::ScalarType dtype) {
  return cuda::gated_residual_takes(type_of(dtype), type_of(y.scalar_type())) ? y : y.to(dtype);
}

struct Gate {
  explicit Gate(const Tensor& gate) : tensor(gate.contiguous()) {}
  cuda::Gate gate() const { return {tensor.const_data_ptr(), type_of(tensor.scalar_type()), tensor.numel() > 1}; }
  Tensor tensor;
};

struct Mask {
  explicit Mask(const optional<Tensor>& mask) : tensor(mask ? mask->contiguous() : Tensor()) {}
  const bool* rows() const { return tensor.defined() ? static_cast<const bool*>(tensor.const_data_ptr()) : nullptr; }
  Tensor tensor;
};

void check(const char* failure) { TORCH_CHECK(!failure, "vlmkernels.gated_residual on CUDA: ", failure); }

Tensor gated_residual(const Tensor& x_, const Tensor& y_, const Tensor& gate_, const optional<Tensor>& row_mask) {
  need_gated_residual(Need("gated_residual", x_.device()), "x", x_, y_, gate_, row_mask);
  const auto dtype = c10::promoteTypes(x_.scalar_type(), y_.scalar_type());
  const Tensor out = at::empty(x_.sizes(), x_.options().dtype(dtype));
  if (out.numel() == 0) return out;
  const c10::DeviceGuard guard(x_.device());
  const Operand x(x_.to(dtype)), y(branch(y_, dtype));
  const Gate gate(gate_);
  const Mask mask(row_mask);
  check(
      cuda::gated_residual(x.matrix(), y.matrix(), gate.gate(), mask.rows(), out.data_ptr(), x.rows, x.d, current_stream(x_)));
  return out;
}

std::tuple<Tensor, Tensor> gated_residual_bwd(const Tensor& dout_, const Tensor& y_, const Tensor& gate_,
                                              const optional<Tensor>& row_mask, std::array<bool, 2> needs) {
  const auto [need_y, need_gate] = needs;
  need_gated_residual(Need("gated_residual_bwd", dout_.device()), "dout", dout_, y_, gate_, row_mask);
  const auto dtype = c10::promoteTypes(dout_.scalar_type(), y_.scalar_type());
  const auto empty_like = [](bool needed, const Tensor& like) {
    return at::empty(needed ? like.sizes() : at::IntArrayRef{0}, like.options());
  };
  const Tensor branch_ = branch(y_, dtype), dy = empty_like(need_y, branch_), dgate = empty_like(need_gate, gate_);
  if (y_.numel() == 0 || !(need_y || need_gate)) return {dy.to(y_.scalar_type()), dgate.zero_()};
  const c10::DeviceGuard guard(y_.device());
  const Operand dout(dout_.to(dtype)), y(branch_);
  const Gate gate(gate_);
  const Mask mask(row_mask);
  void* const to_y = need_y ? dy.data_ptr() : nullptr;
  const auto scratch = cuda::gated_residual_bwd_scratch(dout.matrix(), y.matrix(), gate.gate(), to_y, y.rows, y.d);
  const Tensor partial = at::empty({need_gate ? scratch : 0}, y_.options().dtype(at::kDouble));
  check(cuda::gated_residual_bwd(dout.matrix(), y.matrix(), gate.gate(), mask.rows(), to_y,
                                 need_gate ? dgate.data_ptr() : nullptr, static_cast<double*>(partial.data_ptr()), y.rows, y.d,
                                 current_stream(y_)));
  return {dy.to(y_.scalar_type()), dgate};
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CUDA, m) {
  m.impl("gated_residual", &gated_residual);
  m.impl("gated_residual_bwd", &gated_residual_bwd);
}

}  // namespace vlmk
