#include "pairwise.h"

namespace vlmk::VLMK_ISA {

// out[c][r] = x[r][c], in square blocks that stay in L1.
template <class W>
static void transpose(const W* x, int64_t ldx, int64_t rows, int64_t cols, W* out, int64_t ldo) {
  constexpr int64_t kBlock = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += kBlock) {
    for (int64_t c0 = 0; c0 < cols; c0 += kBlock) {
      for (int64_t c = c0; c < min_(c0 + kBlock, cols); ++c) {
        for (int64_t r = r0; r < min_(r0 + kBlock, rows); ++r) out[c * ldo + r] = x[r * ldx + c];
      }
    }
  }
}

template <class P>
void pack_transposed_a(const P* x, int64_t ldx, int64_t count, int64_t d, int64_t block, P* out) {
  transpose(x, ldx, count, d, out, block);
  for (int64_t c = 0; c < d; ++c) {
    for (int64_t r = count; r < block; ++r) out[c * block + r] = P{};
  }
}

template <class P>
void pack_transposed_b(const P* x, int64_t ldx, int64_t count, int64_t d, int64_t depth, int64_t block, P* out) {
  if constexpr (kPaired<P>) {
    struct Pair {
      P first, second;
    };
    auto* pairs = reinterpret_cast<Pair*>(out);
    if (d == depth && ldx % 2 == 0) {
      transpose(reinterpret_cast<const Pair*>(x), ldx / 2, count, d / 2, pairs, block);
    } else {
      for (int64_t c = 0; c < depth; c += 2) {
        for (int64_t r = 0; r < count; ++r) {
          pairs[c / 2 * block + r] = {c < d ? x[r * ldx + c] : P{}, c + 1 < d ? x[r * ldx + c + 1] : P{}};
        }
      }
    }
    for (int64_t c = 0; c < depth / 2; ++c) {
      for (int64_t r = count; r < block; ++r) pairs[c * block + r] = {};
    }
  } else {
    pack_transposed_a(x, ldx, count, d, block, out);
  }
}

void pack_rows_b(const bf16* x, int64_t ldx, int64_t count, int64_t d, int64_t depth, int64_t block, bf16* out) {
  for (int64_t r = 0; r < block; r += 2) {
    bf16* pair = out + r * depth;
    const bf16 *first = x + r * ldx, *second = first + ldx;
    const bool has_first = r < count, has_second = r + 1 < count;
    for (int64_t c = 0; c < depth; ++c) {
      pair[2 * c] = has_first && c < d ? first[c] : bf16{};
      pair[2 * c + 1] = has_second && c < d ? second[c] : bf16{};
    }
  }
}

template void pack_transposed_a(const float*, int64_t, int64_t, int64_t, int64_t, float*);
template void pack_transposed_a(const double*, int64_t, int64_t, int64_t, int64_t, double*);
template void pack_transposed_a(const bf16*, int64_t, int64_t, int64_t, int64_t, bf16*);
template void pack_transposed_b(const float*, int64_t, int64_t, int64_t, int64_t, int64_t, float*);
template void pack_transposed_b(const double*, int64_t, int64_t, int64_t, int64_t, int64_t, double*);
template void pack_transposed_b(const bf16*, int64_t, int64_t, int64_t, int64_t, int64_t, bf16*);

}  // namespace vlmk::VLMK_ISA
