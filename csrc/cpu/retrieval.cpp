#include "vlmkernels/retrieval.h"

#include <type_traits>

#include "pack.h"
#include "registers.h"

namespace vlmk::VLMK_ISA {
namespace {

constexpr int64_t kFewAtOnce = 8;  // keys that stay in the first cache while queries go by

VLMK_INLINE float to_acc(int8_t x) { return x; }

// The square of the norm, in parts as `dot`.
template <class A, class S>
double square(const S* x, int64_t count) {
  double sum = 0;
  for (int64_t c0 = 0; c0 < count; c0 += kSumPart) {
    A part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t c = c0; c < min_(c0 + kSumPart, count); ++c) {
      const A v = to_acc(x[c]);
      part += v * v;
    }
    sum += part;
  }
  return sum;
}

template <class A>
A dot_of_rest(const A* x, const A* y, int64_t count) {
  A sum = 0;
  for (int64_t c = 0; c < count; ++c) sum += x[c] * y[c];
  return sum;
}

// Four products of X rows x and Y rows y, all `d` apart, formed at a time: sums[i][j] = <x_i, y_j>. Eight sums that do not wait
// for one another.
template <int X, int Y, class A>
__attribute__((noinline)) void four_dots(const A* x, const A* y, int64_t d, A* sums) {
  static_assert(X * Y == 4);
  constexpr int64_t lanes = Registers<A>::lanes, step = 2 * lanes, part = kSumDepth * step;
  for (int i = 0; i < 4; ++i) sums[i] = 0;
  for (int64_t c0 = 0; c0 < d; c0 += part) {
    const int64_t end = min_(c0 + part, d), whole = c0 + (end - c0) / step * step;
    Register<A> some[2][X][Y] = {};
    for (int64_t c = c0; c < whole; c += step) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int64_t at = c + half * lanes;
        Register<A> v[X];
#pragma GCC unroll 4
        for (int i = 0; i < X; ++i) v[i] = from_memory(x + i * d + at);
#pragma GCC unroll 4
        for (int j = 0; j < Y; ++j) {
          const A* row = y + j * d + at;
          if (X == 1) __builtin_prefetch(row + 8 * d);  // rows are shorter than what hardware needs to see a stream
          const Register<A> w = from_memory(row);
#pragma GCC unroll 4
          for (int i = 0; i < X; ++i) some[half][i][j] += v[i] * w;
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < X; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < Y; ++j) {
        const Register<A> both = some[0][i][j] + some[1][i][j];
        A lane[lanes], total = 0;
        __builtin_memcpy(lane, &both, sizeof(both));
#pragma omp simd reduction(+ : total)
        for (int64_t l = 0; l < lanes; ++l) total += lane[l];
        sums[i * Y + j] += total + dot_of_rest(x + i * d + whole, y + j * d + whole, end - whole);
      }
    }
  }
}

// sums[j] = <x, y_j> of four rows, which are widened in registers.
template <class S>
__attribute__((noinline)) void four_dots_of(const float* x, const S* y, int64_t d, float* sums) {
  const S *y0 = y, *y1 = y + d, *y2 = y + 2 * d, *y3 = y + 3 * d;
  for (int i = 0; i < 4; ++i) sums[i] = 0;
  for (int64_t c0 = 0; c0 < d; c0 += 4 * kSumDepth) {
    const int64_t end = min_(c0 + 4 * kSumDepth, d);
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t c = c0; c < end; ++c) {
      const float v = x[c];
      s0 += v * to_acc(y0[c]), s1 += v * to_acc(y1[c]), s2 += v * to_acc(y2[c]), s3 += v * to_acc(y3[c]);
    }
    sums[0] += s0, sums[1] += s1, sums[2] += s2, sums[3] += s3;
  }
}

// out[j] = <x, y_j>; the last rows are counted twice rather than read past.
template <class A, class S>
void dots_of_one(const A* x, const S* y, int64_t count, int64_t d, A* out) {
  for (int64_t j = 0; j < count; j += 4) {
    A sums[4];
    if (j + 4 > count) {
      for (; j < count; ++j) {
        A sum = 0;
        for (int64_t c0 = 0; c0 < d; c0 += kSumPart) {
          A part = 0;
#pragma omp simd reduction(+ : part)
          for (int64_t c = c0; c < min_(c0 + kSumPart, d); ++c) part += x[c] * static_cast<A>(to_acc(y[j * d + c]));
          sum += part;
        }
        out[j] = sum;
      }
      return;
    }
    if constexpr (std::is_same_v<S, A>) {
      four_dots<1, 4>(x, y + j * d, d, sums);
    } else {
      four_dots_of(x, y + j * d, d, sums);
    }
    for (int i = 0; i < 4; ++i) out[j + i] = sums[i];
  }
}

// out[i][j] = <x_i, y_j>, two rows by two.
template <class A>
void dots_of_few(const A* x, int64_t n, const A* y, int64_t count, int64_t d, A* out, int64_t ldo) {
  for (int64_t i = 0; i < n; i += 2) {
    const A* row = x + i * d;
    if (i + 1 == n) return dots_of_one(row, y, count, d, out + i * ldo);
    const int64_t pairs = count / 2 * 2;
    for (int64_t j = 0; j < pairs; j += 2) {
      A sums[4];
      four_dots<2, 2>(row, y + j * d, d, sums);
      for (int u = 0; u < 2; ++u) {
        for (int v = 0; v < 2; ++v) out[(i + u) * ldo + j + v] = sums[2 * u + v];
      }
    }
    for (int64_t u = 0; pairs < count && u < 2; ++u) {
      dots_of_one(row + u * d, y + pairs * d, 1, d, out + (i + u) * ldo + pairs);
    }
  }
}

}  // namespace

template <class S, class P>
void retrieval_rows(const S* x, int64_t count, int64_t d, int64_t rows, int64_t depth, P* out) {
  for (int64_t i = count * depth; i < rows * depth; ++i) out[i] = P{};
  for (int64_t r = 0; r < count; ++r, x += d, out += depth) {
    if constexpr (std::is_same_v<S, P>) {
      __builtin_memcpy(out, x, d * sizeof(P));
    } else {
#pragma omp simd
      for (int64_t c = 0; c < d; ++c) from_acc(static_cast<acc_t<P>>(to_acc(x[c])), out[c]);
    }
    for (int64_t c = d; c < depth; ++c) out[c] = P{};
  }
}

template <class S, class A>
void retrieval_factors(const S* x, int64_t count, int64_t d, const A* scale, bool normalize, A* factors) {
  for (int64_t r = 0; r < count; ++r, x += d) {
    const A c = scale ? scale[r] : A(1);
    factors[r] = c;
    if (!normalize) continue;
    const double norm = std::abs(static_cast<double>(c)) * std::sqrt(square<A>(x, d));
    factors[r] = norm > 1e-12 || norm != norm ? static_cast<A>(c / norm) : c * A(1e12);
  }
}

template <class P>
void retrieval_tile(const Similarities<P>& g, int64_t block, const P* keys, int64_t rows, const acc_t<P>* b, acc_t<P>* tile) {
  using A = acc_t<P>;
  const int64_t cols = min_(g.width, g.n - block * g.width);
  for (int64_t d = 0; d < g.depth; d += kSumDepth) {
    g.product(kTileRows, g.width, min_(kSumDepth, g.depth - d), g.depth, g.width, g.width, d > 0, keys + d,
              g.queries + (block * g.depth + d) * g.width, tile);
  }
  const A* a = g.a ? g.a + block * g.width : nullptr;
  for (int64_t r = 0; (a || b) && r < rows; ++r) {
    A* row = tile + r * g.width;
    const A factor = b ? b[r] : A(1);
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) row[c] = row[c] * factor * (a ? a[c] : A(1));
  }
}

template <class S, class A>
void retrieval_few(const A* queries, int64_t n, const S* keys, int64_t count, int64_t d, const A* a, const A* b, A* widened,
                   A* out, int64_t ldo) {
  constexpr bool same = std::is_same_v<S, A>, in_registers = same || std::is_same_v<A, float>;
  if (in_registers && n == 1) {
    if constexpr (in_registers) dots_of_one(queries, keys, count, d, out);
  } else {
    for (int64_t j0 = 0; j0 < count; j0 += kFewAtOnce) {
      const int64_t some = min_(kFewAtOnce, count - j0);
      const A* rows;
      if constexpr (same) {
        rows = keys + j0 * d;
      } else {
        retrieval_rows(keys + j0 * d, some, d, some, d, widened);
        rows = widened;
      }
      dots_of_few(queries, n, rows, some, d, out + j0, ldo);
    }
  }
  for (int64_t i = 0; (a || b) && i < n; ++i) {
    const A factor = a ? a[i] : A(1);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) out[i * ldo + j] = out[i * ldo + j] * (b ? b[j] : A(1)) * factor;
  }
}

bool retrieval_any_match(const Labels& labels, int64_t i0, int64_t cols, int64_t j0, int64_t rows) {
  const int64_t* query = labels.query + i0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t key = labels.key[j0 + r];
    int64_t any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t c = 0; c < cols; ++c) any |= query[c] == key;
    if (any) return true;
  }
  return false;
}

template <class A>
void retrieval_best(const Labels& labels, int64_t i0, int64_t cols, int64_t j0, int64_t rows, const A* tile, int64_t ld,
                    const BestMatch<A>& queries, const BestMatch<A>& keys) {
  const auto take = [](const BestMatch<A>& best, int64_t i, A score) {
    best.any[i] = 1;
    if (score > best.score[i] || score != score) best.score[i] = score;  // a NaN stays
  };
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      if (labels.query[i0 + c] != labels.key[j0 + r]) continue;
      take(queries, i0 + c, tile[r * ld + c]);
      if (keys.score) take(keys, j0 + r, tile[r * ld + c]);
    }
  }
}

#define VLMK_OF_KEYS(S, A)                                                         \
  template void retrieval_rows(const S*, int64_t, int64_t, int64_t, int64_t, A*);  \
  template void retrieval_factors(const S*, int64_t, int64_t, const A*, bool, A*); \
  template void retrieval_few(const A*, int64_t, const S*, int64_t, int64_t, const A*, const A*, A*, A*, int64_t);
#define VLMK_INSTANTIATE(A) \
  VLMK_OF_KEYS(float, A)    \
  VLMK_OF_KEYS(double, A)   \
  VLMK_OF_KEYS(bf16, A)     \
  VLMK_OF_KEYS(f16, A)      \
  VLMK_OF_KEYS(int8_t, A)
#define VLMK_BEST(A)                                                                                                      \
  template void retrieval_best(const Labels&, int64_t, int64_t, int64_t, int64_t, const A*, int64_t, const BestMatch<A>&, \
                               const BestMatch<A>&);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_BEST(float)
VLMK_BEST(double)
template void retrieval_rows(const bf16*, int64_t, int64_t, int64_t, int64_t, bf16*);
template void retrieval_tile(const Similarities<float>&, int64_t, const float*, int64_t, const float*, float*);
template void retrieval_tile(const Similarities<double>&, int64_t, const double*, int64_t, const double*, double*);
template void retrieval_tile(const Similarities<bf16>&, int64_t, const bf16*, int64_t, const float*, float*);

}  // namespace vlmk::VLMK_ISA
