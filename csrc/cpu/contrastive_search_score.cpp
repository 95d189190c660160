#include "vlmkernels/contrastive_search_score.h"

#include "vector.h"

namespace vlmk::VLMK_ISA {
namespace {

constexpr double kEps = 1e-12;
constexpr int64_t kPair = 2;         // rows of either side whose four products are summed at once
constexpr int64_t kDepth = 1 << 12;  // of the chains of a product's vectors, before the sum goes on in double

template <class A>
constexpr int64_t padded(int64_t d) {
  return (d + Vectors<A>::lanes - 1) / Vectors<A>::lanes * Vectors<A>::lanes;
}

// A row divided by its norm, filled up with zeros.
template <class T, class A>
VLMK_INLINE void put_unit(const T* x, int64_t d, A* to) {
  double sum = 0;
  for (int64_t c0 = 0; c0 < d; c0 += kSumPart) {
    A part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t c = c0; c < min_(c0 + kSumPart, d); ++c) part += to_acc(x[c]) * to_acc(x[c]);
    sum += part;
  }
  const double norm = std::sqrt(sum);
  const A factor = static_cast<A>(1 / (norm < kEps ? kEps : norm));
#pragma omp simd
  for (int64_t c = 0; c < d; ++c) to[c] = to_acc(x[c]) * factor;
  for (int64_t c = d; c < padded<A>(d); ++c) to[c] = 0;
}

// out = <h_0, c_0>, <h_0, c_1>, <h_1, c_0>, <h_1, c_1>
template <class A>
VLMK_INLINE void products(const A* h, const A* c, int64_t width, double* out) {
  for (int64_t i = 0; i < kPair * kPair; ++i) out[i] = 0;
  for (int64_t d0 = 0; d0 < width; d0 += kDepth) {
    Vec<A> sums[kPair * kPair] = {};
    for (int64_t d = d0; d < min_(d0 + kDepth, width); d += Vectors<A>::lanes) {
      const Vec<A> h0 = load<Vec<A>>(h + d), h1 = load<Vec<A>>(h + width + d);
      const Vec<A> c0 = load<Vec<A>>(c + d), c1 = load<Vec<A>>(c + width + d);
      sums[0] += h0 * c0, sums[1] += h0 * c1, sums[2] += h1 * c0, sums[3] += h1 * c1;
    }
    A part[kPair * kPair];
    sums_of(sums, part);
    for (int64_t i = 0; i < kPair * kPair; ++i) out[i] += part[i];
  }
}

}  // namespace

template <class T>
int64_t repetition_bytes(int64_t d) {
  return (kCandidates + kPair) * padded<acc_t<T>>(d) * static_cast<int64_t>(sizeof(acc_t<T>));
}

template <class T>
void repetition(const T* hidden, int64_t count, const T* context, int64_t tokens, int64_t d, Scratch scratch, acc_t<T>* out) {
  using A = acc_t<T>;
  const int64_t width = padded<A>(d);
  A* h = scratch.take<A>(kCandidates * width);
  A* c = scratch.take<A>(kPair * width);
  double most[kCandidates], not_finite[kCandidates] = {};
  for (int64_t v = 0; v < kCandidates; ++v) most[v] = tokens > 0 ? -__builtin_inf() : 0;
  // A last row without a partner has itself for one
  for (int64_t v = 0; v < (count + 1) / kPair * kPair; ++v) put_unit(hidden + min_(v, count - 1) * d, d, h + v * width);
  for (int64_t j = 0; j < tokens; j += kPair) {
    for (int64_t i = 0; i < kPair; ++i) put_unit(context + min_(j + i, tokens - 1) * d, d, c + i * width);
    for (int64_t v = 0; v < count; v += kPair) {
      double cosines[kPair * kPair];
      products(h + v * width, c, width, cosines);
      for (int64_t i = 0; i < kPair * kPair; ++i) {
        most[v + i / kPair] = max_(most[v + i / kPair], cosines[i]);
        not_finite[v + i / kPair] += cosines[i] * 0;
      }
    }
  }
  for (int64_t v = 0; v < count; ++v) out[v] = static_cast<A>(most[v] + not_finite[v]);
}

template <class A>
int64_t contrastive_search_score(A* prob, const A* repetition, const A* similarity, int64_t k, double alpha, double beta) {
  A top = -__builtin_inf();
  double sum = 0;
  for (int64_t v = 0; similarity && v < k; ++v) top = max_(top, similarity[v]);
  for (int64_t v = 0; similarity && v < k; ++v) sum += exp_(similarity[v] - top);
  int64_t best = 0;
  A largest = -__builtin_inf();
  for (int64_t v = 0; v < k; ++v) {
    A score = static_cast<A>(1 - alpha) * prob[v];
    if (repetition) score -= static_cast<A>(alpha) * repetition[v];
    if (similarity) score += static_cast<A>(beta) * static_cast<A>(exp_(similarity[v] - top) / sum);
    prob[v] = score;
    if (score > largest) best = v, largest = score;
  }
  return best;
}

#define VLMK_INSTANTIATE(T)                      \
  template int64_t repetition_bytes<T>(int64_t); \
  template void repetition(const T*, int64_t, const T*, int64_t, int64_t, Scratch, acc_t<T>*);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)
VLMK_INSTANTIATE(f16)
template int64_t contrastive_search_score(float*, const float*, const float*, int64_t, double, double);
template int64_t contrastive_search_score(double*, const double*, const double*, int64_t, double, double);

}  // namespace vlmk::VLMK_ISA
