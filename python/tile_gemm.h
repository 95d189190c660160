#pragma once
#include <string>
#include <type_traits>

#include "vlmkernels/tile_gemm.h"

namespace vlmk {

// Who computes the tile products here: oneDNN's micro-kernels where this CPU and build of torch have them, ATen's mm elsewhere.
// Null for bf16 where no bf16 product exists: the caller widens to float.
template <class P>
TileProduct<P> tile_product();
template <>
TileProduct<float> tile_product<float>();
template <>
TileProduct<double> tile_product<double>();
template <>
TileProduct<bf16> tile_product<bf16>();
// That of the deep tiles of searches: our own with AVX2, where oneDNN's takes 1.2 times as long; tile_product elsewhere.
template <class P>
TileProduct<P> search_product() {
#ifdef VLMK_X86
  if constexpr (std::is_same_v<P, float>) {
    if (isa() == Isa::avx2) return avx2::tile_product;
  }
#endif
  return tile_product<P>();
}
// Whether tile_product is ATen's, which may sum in another order for other shapes.
template <class P>
bool tile_product_is_mm();
std::string tile_product_name();
// Frees what the calling thread's products hold (the AMX tile configuration); call at the end of a thread's work.
void tile_product_release();

}  // namespace vlmk
