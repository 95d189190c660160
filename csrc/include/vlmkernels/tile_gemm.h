#pragma once
#include <cstdint>

#include "vlmkernels/isa.h"
#include "vlmkernels/types.h"

namespace vlmk {

// C[m, n] = A[m, k] B[k, n], or C += A B when accumulate, with row strides lda, ldb, ldc in elements. The caller of a kernel
// passes the implementation. For bf16, B has pairs of rows interleaved, [k / 2][n][2] with ldb counted in pairs, and k is even.
template <class P>
using TileProduct = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate,
                             const P* a, const P* b, acc_t<P>* c);

// One for float that needs no library. Its sums run over k in order, whatever m and n are.
VLMK_PER_ISA(void tile_product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate,
                               const float* a, const float* b, float* c);)

}  // namespace vlmk
