#include "vlmkernels/tile_gemm.h"

#include <algorithm>

#include "registers.h"

namespace vlmk::VLMK_ISA {
namespace {

// Sums of kRows x kCols elements fill 12 of AVX2's 16 registers. Columns of B are copied for a whole part of its depth: there
// they are neighbours in the nearest cache, while rows of B are often a power of two apart and displace each other.
constexpr int64_t kRows = 6, kVectors = 2, kCols = kVectors * Registers<float>::lanes, kDepth = 256;

// c, or 0 when `fresh`, plus `rows` rows of A times kCols columns of B.
template <int64_t rows>
void add_rows(bool fresh, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc) {
  Register<float> sums[rows][kVectors];
#pragma GCC unroll 6
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < kVectors; ++v) {
      sums[r][v] = fresh ? Register<float>{} : from_memory(c + r * ldc + v * Registers<float>::lanes);
    }
  }
  for (int64_t e = 0; e < k; ++e, b += ldb) {
    Register<float> columns[kVectors];
#pragma GCC unroll 2
    for (int64_t v = 0; v < kVectors; ++v) columns[v] = from_memory(b + v * Registers<float>::lanes);
#pragma GCC unroll 6
    for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int64_t v = 0; v < kVectors; ++v) sums[r][v] += a[r * lda + e] * columns[v];
    }
  }
#pragma GCC unroll 6
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < kVectors; ++v) {
      __builtin_memcpy(c + r * ldc + v * Registers<float>::lanes, &sums[r][v], sizeof(sums[r][v]));
    }
  }
}

void add_some_rows(int64_t rows, bool fresh, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                   int64_t ldc) {
  switch (rows) {
    case 1:
      return add_rows<1>(fresh, k, a, lda, b, ldb, c, ldc);
    case 2:
      return add_rows<2>(fresh, k, a, lda, b, ldb, c, ldc);
    case 3:
      return add_rows<3>(fresh, k, a, lda, b, ldb, c, ldc);
    case 4:
      return add_rows<4>(fresh, k, a, lda, b, ldb, c, ldc);
    case 5:
      return add_rows<5>(fresh, k, a, lda, b, ldb, c, ldc);
    default:
      return add_rows<kRows>(fresh, k, a, lda, b, ldb, c, ldc);
  }
}

}  // namespace

void tile_product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate, const float* a,
                  const float* b, float* c) {
  alignas(64) float panel[kDepth * kCols];
  for (int64_t e = 0; e < (k > 0 ? k : 1); e += kDepth) {
    const bool fresh = e == 0 && !accumulate;
    const int64_t depth = min_(kDepth, k - e);
    for (int64_t j = 0; j < n; j += kCols) {
      const int64_t cols = min_(kCols, n - j);
      const float* from = b + e * ldb + j;
      const bool copied = m > 2 * kRows || cols < kCols;
      for (int64_t p = 0; p < (copied ? depth : 0); ++p) {
        if (cols == kCols) {
          __builtin_memcpy(panel + p * kCols, from + p * ldb, sizeof(float) * kCols);
        } else {
          std::fill(std::copy_n(from + p * ldb, cols, panel + p * kCols), panel + (p + 1) * kCols, 0.0f);
        }
      }
      const float* columns = copied ? panel : from;
      const int64_t step = copied ? kCols : ldb;
      for (int64_t i = 0; i < m; i += kRows) {
        const int64_t rows = min_(kRows, m - i);
        const float* left = a + i * lda + e;
        float* out = c + i * ldc + j;
        if (cols == kCols) {
          add_some_rows(rows, fresh, depth, left, lda, columns, step, out, ldc);
          continue;
        }
        float whole[kRows * kCols] = {};
        for (int64_t r = 0; r < rows; ++r) std::copy_n(out + r * ldc, cols, whole + r * kCols);
        add_some_rows(rows, fresh, depth, left, lda, columns, step, whole, kCols);
        for (int64_t r = 0; r < rows; ++r) std::copy_n(whole + r * kCols, cols, out + r * ldc);
      }
    }
  }
}

}  // namespace vlmk::VLMK_ISA
