#pragma once
// Blocks of rows turned into the operands of tile products.
#include "simd.h"
#include "vlmkernels/pack.h"

namespace vlmk::VLMK_ISA {
namespace {

template <class P>
constexpr bool kPaired = sizeof(P) == 2;  // B operands hold pairs of rows

// Two neighbouring elements of a B operand of paired rows.
struct alignas(4) Pair {
  uint32_t bits;
};
VLMK_INLINE void put_pair(float first, float second, Pair& out) {
  bf16 low, high;
  round_to(first, low);
  round_to(second, high);
  out.bits = static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16;
}

using Vector = uint32_t __attribute__((vector_size(64)));
template <int... J>
struct Words {};
using AllWords = Words<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;

// Indices into the 32 words of (upper row, lower row) that a stage takes for word j of each.
constexpr int upper_word(int s, int j) { return j & s ? 16 + j - s : j; }
constexpr int lower_word(int s, int j) { return j & s ? 16 + j : j + s; }

// One stage of transposing 16 rows of 16 words: swaps the off-diagonal blocks of size S of every pair of rows S apart.
template <int S, int... J>
VLMK_INLINE void swap_blocks(Vector (&row)[16], Words<J...>) {
  for (int i = 0; i < 16; ++i) {
    if (i & S) continue;
    const Vector upper = row[i], lower = row[i + S];
    row[i] = __builtin_shufflevector(upper, lower, upper_word(S, J)...);
    row[i + S] = __builtin_shufflevector(upper, lower, lower_word(S, J)...);
  }
}

// For every column c of x [rows][cols], words `ldx` apart, and 16 rows at a time: store16(c, r, words of rows r .. r + 15), and
// store1(c, r, word) for what is left.
template <class W, class Store16, class Store1>
void for_columns(const W* x, int64_t ldx, int64_t rows, int64_t cols, Store16 store16, Store1 store1) {
  static_assert(sizeof(W) == 4);
  const int64_t full_rows = rows / 16 * 16, full_cols = cols / 16 * 16;
  for (int64_t r = 0; r < full_rows; r += 16) {
    for (int64_t c = 0; c < full_cols; c += 16) {
      Vector block[16];
      for (int64_t i = 0; i < 16; ++i) __builtin_memcpy(&block[i], x + (r + i) * ldx + c, 64);
      swap_blocks<8>(block, AllWords());
      swap_blocks<4>(block, AllWords());
      swap_blocks<2>(block, AllWords());
      swap_blocks<1>(block, AllWords());
      for (int64_t i = 0; i < 16; ++i) store16(c + i, r, block[i]);
    }
    for (int64_t c = full_cols; c < cols; ++c) {
      for (int64_t i = r; i < r + 16; ++i) store1(c, i, x[i * ldx + c]);
    }
  }
  for (int64_t r = full_rows; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) store1(c, r, x[r * ldx + c]);
  }
}

// out[c][r] = x[r][c]
template <class W>
void transpose(const W* x, int64_t ldx, int64_t rows, int64_t cols, W* out, int64_t ldo) {
  if constexpr (sizeof(W) == 4) {
    for_columns(
        x, ldx, rows, cols, [&](int64_t c, int64_t r, Vector words) { __builtin_memcpy(out + c * ldo + r, &words, 64); },
        [&](int64_t c, int64_t r, W word) { out[c * ldo + r] = word; });
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) out[c * ldo + r] = x[r * ldx + c];
    }
  }
}

}  // namespace
}  // namespace vlmk::VLMK_ISA
