#include "block_product.h"

#include <type_traits>

namespace vlmk::VLMK_ISA {

template <class S, class P>
void load_rows(const S* x, const int64_t* index, int64_t count, int64_t d, int64_t rows, int64_t depth, P* out) {
  for (int64_t i = 0; i < rows; ++i, out += depth) {
    const int64_t loaded = i < count ? d : 0;
    const S* row = i < count ? x + (index ? index[i] : i) * d : x;
    if constexpr (std::is_same_v<S, P>) {
      for (int64_t c = 0; c < loaded; ++c) out[c] = row[c];
    } else {
#pragma omp simd
      for (int64_t c = 0; c < loaded; ++c) from_acc(static_cast<acc_t<P>>(to_acc(row[c])), out[c]);
    }
    for (int64_t c = loaded; c < depth; ++c) out[c] = P{};
  }
}

template <class P>
void pack_columns_b(const P* w, int64_t ldw, const acc_t<P>* t, int64_t count, int64_t d, int64_t depth, P* out) {
  constexpr int64_t cols = kBlockCols<P>;
  if constexpr (kPaired<P>) {
    for (int64_t i = 0; i < depth; i += 2, out += 2 * cols) {
      auto* pairs = reinterpret_cast<Pair*>(out);
      const P *first = w + i * ldw, *second = first + ldw;
      const acc_t<P> t0 = t && i < d ? t[i] : 1, t1 = t && i + 1 < d ? t[i + 1] : 1;
      if (i + 1 < d && t) {
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) put_pair(t0 * to_acc(first[c]), t1 * to_acc(second[c]), pairs[c]);
      } else if (i + 1 < d) {
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) {
          pairs[c].bits = static_cast<uint32_t>(first[c].bits) | static_cast<uint32_t>(second[c].bits) << 16;
        }
      } else if (i < d) {
        for (int64_t c = 0; c < count; ++c) put_pair(t0 * to_acc(first[c]), 0.0f, pairs[c]);
      }
      for (int64_t c = i < d ? count : 0; c < cols; ++c) pairs[c] = {};
    }
  } else {
    for (int64_t i = 0; i < depth; ++i, w += ldw, out += cols) {
      const P scale = t && i < d ? t[i] : P(1);
      const int64_t loaded = i < d ? count : 0;
#pragma omp simd
      for (int64_t c = 0; c < loaded; ++c) out[c] = scale * w[c];
      for (int64_t c = loaded; c < cols; ++c) out[c] = P{};
    }
  }
}

#define VLMK_LOAD(P)                                                                              \
  template void load_rows(const float*, const int64_t*, int64_t, int64_t, int64_t, int64_t, P*);  \
  template void load_rows(const double*, const int64_t*, int64_t, int64_t, int64_t, int64_t, P*); \
  template void load_rows(const bf16*, const int64_t*, int64_t, int64_t, int64_t, int64_t, P*);   \
  template void load_rows(const f16*, const int64_t*, int64_t, int64_t, int64_t, int64_t, P*);    \
  template void pack_columns_b(const P*, int64_t, const acc_t<P>*, int64_t, int64_t, int64_t, P*);
VLMK_LOAD(float)
VLMK_LOAD(double)
VLMK_LOAD(bf16)

}  // namespace vlmk::VLMK_ISA
