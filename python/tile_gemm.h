#pragma once
#include <string>

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
// Whether it is ATen's, which may sum in another order for other shapes.
template <class P>
bool tile_product_is_mm();
std::string tile_product_name();
// Frees what the calling thread's products hold (the AMX tile configuration); call at the end of a thread's work.
void tile_product_release();

}  // namespace vlmk
