#include "vlmkernels/retrieval.h"

#include <type_traits>

#include "pack.h"
#include "registers.h"

namespace vlmk::VLMK_ISA {
namespace {

constexpr int kQueriesAtOnce = 4, kKeysAtOnce = 2;
constexpr int64_t kKeysAhead = 8;  // keys on their way from memory: with two and eight queries they fit into the first cache

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

template <class A, class S>
A dot_of_rest(const A* x, const S* y, int64_t count) {
  A sum = 0;
  for (int64_t c = 0; c < count; ++c) sum += x[c] * to_acc(y[c]);
  return sum;
}

// <x, y> with y read once, in order, as hardware foresees. Four sums that do not wait for one another.
template <class A, class S>
A dot_of_one(const A* x, const S* y, int64_t d) {
  constexpr int64_t lanes = Registers<A>::lanes, step = 4 * lanes, part = kSumDepth * step;
  A sum = 0;
  for (int64_t c0 = 0; c0 < d; c0 += part) {
    const int64_t end = min_(c0 + part, d), whole = c0 + (end - c0) / step * step;
    Register<A> some[4] = {};
    for (int64_t c = c0; c < whole; c += step) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) some[u] += from_memory(x + c + u * lanes) * floats_from_memory(y + c + u * lanes);
    }
    const Register<A> all = (some[0] + some[1]) + (some[2] + some[3]);
    sum += sums_of<1, A>(&all)[0] + dot_of_rest(x + whole, y + whole, end - whole);
  }
  return sum;
}

// The same of types that no register converts: the sums of the four quarters of a row.
template <class S>
float dot_widened(const float* x, const S* y, int64_t d) {
  float sum = 0;
  for (int64_t c0 = 0; c0 < d; c0 += 4 * kSumDepth) {
    const int64_t count = min_(4 * kSumDepth, d - c0), quarter = count / 4, q = quarter;
    const float* v = x + c0;
    const S* w = y + c0;
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t c = 0; c < quarter; ++c) {
      s0 += v[c] * to_acc(w[c]), s1 += v[q + c] * to_acc(w[q + c]);
      s2 += v[2 * q + c] * to_acc(w[2 * q + c]), s3 += v[3 * q + c] * to_acc(w[3 * q + c]);
    }
    sum += (s0 + s1) + (s2 + s3) + dot_of_rest(v + 4 * q, w + 4 * q, count - 4 * q);
  }
  return sum;
}

// out[i][j] = <x_i, y_j> of X rows x and Y rows y, all `d` apart. Each product is summed in one order whatever X and Y are.
// Meanwhile the `stride` values after `ahead` of every register of a row are fetched.
template <int X, int Y, class A>
__attribute__((noinline)) void dots(const A* x, const A* y, int64_t d, const A* ahead, int64_t stride, A* out, int64_t ldo) {
  constexpr int64_t lanes = Registers<A>::lanes, part = kSumDepth * lanes;
  A sums[X][Y] = {};
  for (int64_t c0 = 0; c0 < d; c0 += part) {
    const int64_t end = min_(c0 + part, d), whole = c0 + (end - c0) / lanes * lanes;
    Register<A> some[X][Y] = {};
    for (int64_t c = c0; c < whole; c += lanes, ahead += stride) {
      __builtin_prefetch(ahead);
      Register<A> w[Y];
#pragma GCC unroll 2
      for (int j = 0; j < Y; ++j) w[j] = from_memory(y + j * d + c);
#pragma GCC unroll 4
      for (int i = 0; i < X; ++i) {
        const Register<A> v = from_memory(x + i * d + c);
#pragma GCC unroll 2
        for (int j = 0; j < Y; ++j) some[i][j] += v * w[j];
      }
    }
    constexpr int count = X * Y, width = min_(count > 4 ? 8 : count > 2 ? 4 : count, static_cast<int>(lanes));
#pragma GCC unroll 8
    for (int p0 = 0; p0 < count; p0 += width) {
      Register<A> folded[width];
#pragma GCC unroll 8
      for (int p = 0; p < width; ++p) folded[p] = some[min_(p0 + p, count - 1) / Y][min_(p0 + p, count - 1) % Y];
      const Register<A> lane = sums_of<width, A>(folded);
      for (int p = p0; p < min_(p0 + width, count); ++p) {
        const int i = p / Y, j = p % Y;
        sums[i][j] += lane[p - p0] + dot_of_rest(x + i * d + whole, y + j * d + whole, end - whole);
      }
    }
  }
  for (int i = 0; i < X; ++i) {
    for (int j = 0; j < Y; ++j) out[i * ldo + j] = sums[i][j];
  }
}

// out[i][j] = <x_i, y_j> of one or two keys y. Each group of queries fetches its share of two that come later.
template <class A>
void dots_of_few(const A* x, int64_t n, const A* y, int64_t count, int64_t d, A* out, int64_t ldo) {
  constexpr int64_t lanes = Registers<A>::lanes;
  const int64_t groups = ceil_div(n, kQueriesAtOnce), stride = ceil_div(kKeysAtOnce * lanes, groups);
  const A* ahead = y + kKeysAhead * d;
  const auto group = [&](auto keys, auto queries) {
    dots<decltype(queries)::value, decltype(keys)::value>(x, y, d, ahead, stride, out, ldo);
  };
  const auto groups_of = [&](auto keys) {
    for (; n > 0; n -= kQueriesAtOnce) {
      switch (n) {
        case 1:
          group(keys, std::integral_constant<int, 1>());
          break;
        case 2:
          group(keys, std::integral_constant<int, 2>());
          break;
        case 3:
          group(keys, std::integral_constant<int, 3>());
          break;
        default:
          group(keys, std::integral_constant<int, kQueriesAtOnce>());
      }
      x += kQueriesAtOnce * d, out += kQueriesAtOnce * ldo, ahead += kKeysAtOnce * d / groups;
    }
  };
  if (count == kKeysAtOnce) {
    groups_of(std::integral_constant<int, kKeysAtOnce>());
  } else {
    groups_of(std::integral_constant<int, 1>());
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
    if constexpr (in_registers) {
      for (int64_t j = 0; j < count; ++j) {
        if constexpr (same || std::is_same_v<S, int8_t> || std::is_same_v<S, bf16>) {
          out[j] = dot_of_one(queries, keys + j * d, d);
        } else {
          out[j] = dot_widened(queries, keys + j * d, d);
        }
      }
    }
  } else {
    for (int64_t j0 = 0; j0 < count; j0 += kKeysAtOnce) {
      const int64_t some = min_<int64_t>(kKeysAtOnce, count - j0);
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
