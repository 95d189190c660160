#include "pack.h"

namespace vlmk::VLMK_ISA {

template <class P>
void pack_transposed_a(const P* x, int64_t ldx, int64_t count, int64_t d, int64_t block, P* out) {
  if constexpr (kPaired<P>) {
    if (d % 2 == 0 && ldx % 2 == 0) {  // pairs of features are transposed as words, then parted
      const auto part = [&](int64_t pair, int64_t r, Pair word) {
        out[2 * pair * block + r].bits = static_cast<uint16_t>(word.bits);
        out[(2 * pair + 1) * block + r].bits = static_cast<uint16_t>(word.bits >> 16);
      };
      const auto part_words = [&](int64_t pair, int64_t r, Vector words) {
        P *first = out + 2 * pair * block + r, *second = first + block;
#pragma omp simd
        for (int64_t i = 0; i < kWords; ++i) {
          first[i].bits = static_cast<uint16_t>(words[i]);
          second[i].bits = static_cast<uint16_t>(words[i] >> 16);
        }
      };
      for_columns(reinterpret_cast<const Pair*>(x), ldx / 2, count, d / 2, part_words, part);
    } else {
      transpose(x, ldx, count, d, out, block);
    }
  } else {
    transpose(x, ldx, count, d, out, block);
  }
  for (int64_t c = 0; c < d; ++c) {
    for (int64_t r = count; r < block; ++r) out[c * block + r] = P{};
  }
}

template <class P>
void pack_transposed_b(const P* x, int64_t ldx, int64_t count, int64_t d, int64_t depth, int64_t block, P* out) {
  if constexpr (kPaired<P>) {
    auto* pairs = reinterpret_cast<Pair*>(out);
    if (d == depth && ldx % 2 == 0) {
      transpose(reinterpret_cast<const Pair*>(x), ldx / 2, count, d / 2, pairs, block);
    } else {
      for (int64_t c = 0; c < depth; c += 2) {
        for (int64_t r = 0; r < count; ++r) {
          const uint32_t first = c < d ? x[r * ldx + c].bits : 0, second = c + 1 < d ? x[r * ldx + c + 1].bits : 0;
          pairs[c / 2 * block + r].bits = first | second << 16;
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
    const int64_t full = has_second ? d : 0;
    auto* pairs = reinterpret_cast<Pair*>(pair);
#pragma omp simd
    for (int64_t c = 0; c < full; ++c) pairs[c].bits = first[c].bits | static_cast<uint32_t>(second[c].bits) << 16;
    for (int64_t c = full; c < depth; ++c) {
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
