#pragma once
// Blocks of rows turned into the operands of tile products.
#include <utility>

#include "registers.h"
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

constexpr int kWords = kRegisterBytes / 4;  // of a register
using Vector = uint32_t __attribute__((vector_size(kRegisterBytes)));
template <int... J>
using Words = std::integer_sequence<int, J...>;

// Indices into the words of (upper row, lower row) that a stage takes for word j of each.
constexpr int upper_word(int s, int j) { return j & s ? kWords + j - s : j; }
constexpr int lower_word(int s, int j) { return j & s ? kWords + j : j + s; }

// The stages of transposing as many rows of words: blocks of size S off the diagonal of every pair of rows S apart are swapped.
template <int S, int... J>
VLMK_INLINE void swap_blocks(Vector (&row)[kWords], Words<J...> words) {
  if constexpr (S > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kWords; ++i) {
      if (i & S) continue;
      const Vector upper = row[i], lower = row[i + S];
      row[i] = __builtin_shufflevector(upper, lower, upper_word(S, J)...);
      row[i + S] = __builtin_shufflevector(upper, lower, lower_word(S, J)...);
    }
    swap_blocks<S / 2>(row, words);
  }
}

// For every column c of x [rows][cols], words `ldx` apart, and kWords rows at a time: store_words(c, r, words of rows r, r + 1,
// ...), and store1(c, r, word) for what is left.
template <class W, class StoreWords, class Store1>
void for_columns(const W* x, int64_t ldx, int64_t rows, int64_t cols, StoreWords store_words, Store1 store1) {
  static_assert(sizeof(W) == 4);
  const int64_t full_rows = rows / kWords * kWords, full_cols = cols / kWords * kWords;
  for (int64_t r = 0; r < full_rows; r += kWords) {
    for (int64_t c = 0; c < full_cols; c += kWords) {
      Vector block[kWords];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWords; ++i) __builtin_memcpy(&block[i], x + (r + i) * ldx + c, sizeof(Vector));
      swap_blocks<kWords / 2>(block, std::make_integer_sequence<int, kWords>());
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWords; ++i) store_words(c + i, r, block[i]);
    }
    for (int64_t c = full_cols; c < cols; ++c) {
      for (int64_t i = r; i < r + kWords; ++i) store1(c, i, x[i * ldx + c]);
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
        x, ldx, rows, cols,
        [&](int64_t c, int64_t r, Vector words) { __builtin_memcpy(out + c * ldo + r, &words, sizeof(words)); },
        [&](int64_t c, int64_t r, W word) { out[c * ldo + r] = word; });
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) out[c * ldo + r] = x[r * ldx + c];
    }
  }
}

}  // namespace
}  // namespace vlmk::VLMK_ISA
