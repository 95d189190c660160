#include "dense.h"

namespace vlmk {

TorchProducts& torch_products(at::ScalarType dtype) {
  static TorchProducts float32, bfloat16, others;
  return dtype == at::kFloat ? float32 : dtype == at::kBFloat16 ? bfloat16 : others;
}

void need_layer(const Need& need, int64_t rows, const char* name, const Tensor& weight, at::IntArrayRef sizes, DTypes types,
                const char* bias_name, const optional<Tensor>& bias) {
  need.tensor(name, weight, sizes, types);
  need.tensor(bias_name, bias, weight.size(0), weight.scalar_type());
  need.countable({rows, weight.size(0)});
  need.countable({rows, weight.size(1)});
  need.countable(weight.sizes());
}

Activation activation_of(const Need& need, std::string_view name) {
  static const std::vector<std::string_view> names{"none", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "squared_relu"};
  for (int i = 0; i < 7; ++i) {
    if (name == names[i]) return static_cast<Activation>(i);
  }
  need.refuse("activation must be one of ", c10::Join(", ", names), ", got '", name, "'");
}

Tensor with_last(const Tensor& x, int64_t size, at::ScalarType dtype) {
  auto sizes = x.sizes().vec();
  sizes.back() = size;
  return on_huge_pages(at::empty(sizes, x.options().dtype(dtype)));
}

}  // namespace vlmk
