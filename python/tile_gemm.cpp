#include "tile_gemm.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <omp.h>

#include <exception>
#include <vector>

#include "vlmkernels/isa.h"

namespace vlmk {
namespace {

using at::native::cpublas::brgemm;

const at::BFloat16* as_aten(const bf16* p) { return reinterpret_cast<const at::BFloat16*>(p); }
const float* as_aten(const float* p) { return p; }

template <class P>
void by_brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate, const P* a, const P* b,
               float* c) {
  brgemm(m, n, k, lda, ldb, ldc, accumulate, as_aten(a), as_aten(b), c, sizeof(P) == 2);
}

// Runs f in a team of threads, of which it is the only one to work: there a product of ATen does not spread over the threads,
// whose number would show in its sums.
template <class F>
void alone(F f) {
  if (omp_in_parallel() || at::get_num_threads() == 1) return f();
  std::exception_ptr failure;
#pragma omp parallel num_threads(2)
#pragma omp master
  try {
    f();
  } catch (...) {
    failure = std::current_exception();
  }
  if (failure) std::rethrow_exception(failure);
}

template <class P>
void by_mm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate, const P* a, const P* b,
           P* c) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<P>::value);
  const auto left = at::from_blob(const_cast<P*>(a), {m, k}, {lda, 1}, options);
  const auto right = at::from_blob(const_cast<P*>(b), {k, n}, {ldb, 1}, options);
  auto out = at::from_blob(c, {m, n}, {ldc, 1}, options);
  alone([&] { accumulate ? at::addmm_out(out, out, left, right) : at::mm_out(out, left, right); });
}

// Whether this CPU's micro-kernels serve P: asked once with a small product, because only the call itself knows.
template <class P>
bool probe() {
  if (isa() == Isa::baseline) return false;
  const std::vector<P> a(16 * 64), b(64 * 64);
  std::vector<float> c(16 * 64);
  try {
    brgemm(16, 64, 64, 64, 64, 64, false, as_aten(a.data()), as_aten(b.data()), c.data(), sizeof(P) == 2);
    at::native::cpublas::brgemm_release(sizeof(P) == 2);
  } catch (const std::exception&) {
    return false;
  }
  return true;
}
template <class P>
bool has_brgemm() {
  static const bool served = probe<P>();
  return served && at::globalContext().userEnabledMkldnn();
}

}  // namespace

template <>
TileProduct<float> tile_product<float>() {
  return has_brgemm<float>() ? by_brgemm<float> : by_mm<float>;
}
template <>
TileProduct<double> tile_product<double>() {
  return by_mm<double>;
}
template <>
TileProduct<bf16> tile_product<bf16>() {
  return has_brgemm<bf16>() ? by_brgemm<bf16> : nullptr;
}

template <class P>
bool tile_product_is_mm() {
  return tile_product<P>() == static_cast<TileProduct<P>>(by_mm<P>);
}
template bool tile_product_is_mm<float>();
template bool tile_product_is_mm<double>();
template <>
bool tile_product_is_mm<bf16>() {
  return false;
}

std::string tile_product_name() {
  if (!has_brgemm<float>()) return "ATen mm";
  return has_brgemm<bf16>() ? "oneDNN micro-kernels (float32, bfloat16)" : "oneDNN micro-kernels (float32)";
}

void tile_product_release() {
  if (has_brgemm<float>()) at::native::cpublas::brgemm_release(false);
  if (has_brgemm<bf16>()) at::native::cpublas::brgemm_release(true);
}

}  // namespace vlmk
