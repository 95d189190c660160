#pragma once
#include "vlmkernels/isa.h"
#include "vlmkernels/tile_gemm.h"

namespace vlmk {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t count, int64_t to) { return ceil_div(count, to) * to; }

// What bf16 hardware multiplies at a time. Whatever the type, blocks of whole units keep the distinct shapes of products few.
constexpr int64_t kUnit = 32;
constexpr int64_t whole_units(int64_t count) { return round_up(count, kUnit); }

// The depth of operands of a product: whole units for bf16, filled up with zeros.
template <class P>
constexpr int64_t depth_of(int64_t d) {
  return sizeof(P) == 2 ? whole_units(d) : d;
}

VLMK_PER_ISA(
    // Packs rows [first, first + count) of x [*, ldx] into the B operand of the product with x^T: [depth][block], zero padded;
    // bf16 [depth / 2][block][2].
    template <class P>
    void pack_transposed_b(const P* x, int64_t ldx, int64_t count, int64_t d, int64_t depth, int64_t block, P* out);
    // The same as an A operand, [d][block], whatever P is.
    template <class P> void pack_transposed_a(const P* x, int64_t ldx, int64_t count, int64_t d, int64_t block, P* out);
    // Packs rows of x into the B operand of a product with x: bf16 [block / 2][depth][2], zero padded.
    void pack_rows_b(const bf16* x, int64_t ldx, int64_t count, int64_t d, int64_t depth, int64_t block, bf16* out);)

}  // namespace vlmk
