#pragma once
// What the tests without torch share.
#include <cmath>
#include <cstdint>
#include <cstdio>

inline int failures = 0;

inline void check(const char* what, double got, double want, double tolerance) {
  if (std::fabs(got - want) <= tolerance) return;
  if (++failures < 10) std::printf("%s: got %.9g, wanted %.9g\n", what, got, want);
}

template <class P>
void plain_product(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool accumulate, const P* a,
                   const P* b, P* c) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      P sum = accumulate ? c[i * ldc + j] : P(0);
      for (int64_t e = 0; e < k; ++e) sum += a[i * lda + e] * b[e * ldb + j];
      c[i * ldc + j] = sum;
    }
  }
}

// test_dense.cc: the kernels on blocks of products.
void test_dense_layers();
// test_detection.cc: suppression of boxes and features of boxes.
void test_detection();
// test_relative.cc: relative representations and the score of contrastive search.
void test_relative();
// test_residual.cc: gates of residuals.
void test_residual();
// test_retrieval.cc: the largest similarities, ranks, and hard negatives.
void test_retrieval();
