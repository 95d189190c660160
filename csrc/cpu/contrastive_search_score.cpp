#include "vlmkernels/contrastive_search_score.h"

#include "registers.h"

namespace vlmk::VLMK_ISA {
namespace {

constexpr double kEps = 1e-12;
constexpr int64_t kTile = 3;        // rows of either side whose products are summed at once
constexpr int64_t kChain = 1 << 8;  // additions in a lane, before the sum goes on in double

constexpr int64_t whole_tiles(int64_t rows) { return (rows + kTile - 1) / kTile * kTile; }
template <class A>
constexpr int64_t padded(int64_t d) {
  return (d + Registers<A>::lanes - 1) / Registers<A>::lanes * Registers<A>::lanes;
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

// out[i][j] = <h_i, c_j>
template <class A>
__attribute__((noinline)) void products(const A* h, const A* c, int64_t width, double (&out)[kTile][kTile]) {
  constexpr int64_t lanes = Registers<A>::lanes;
  for (auto& row : out) {
    for (double& x : row) x = 0;
  }
  for (int64_t d0 = 0; d0 < width; d0 += kChain * lanes) {
    Register<A> sums[kTile][kTile] = {};
    for (int64_t d = d0; d < min_(d0 + kChain * lanes, width); d += lanes) {
      Register<A> of_c[kTile];
      for (int64_t j = 0; j < kTile; ++j) of_c[j] = from_memory(c + j * width + d);
      for (int64_t i = 0; i < kTile; ++i) {
        const Register<A> of_h = from_memory(h + i * width + d);
        for (int64_t j = 0; j < kTile; ++j) sums[i][j] += of_h * of_c[j];
      }
    }
    for (int64_t i = 0; i < kTile; ++i) {
      for (int64_t j = 0; j < kTile; ++j) {
        for (int64_t lane = 0; lane < lanes; ++lane) out[i][j] += sums[i][j][lane];
      }
    }
  }
}

}  // namespace

template <class T>
int64_t repetition_bytes(int64_t d) {
  return (kCandidates + kTile) * padded<acc_t<T>>(d) * static_cast<int64_t>(sizeof(acc_t<T>)) + 64;
}

template <class T>
void repetition(const T* hidden, int64_t count, const T* context, int64_t tokens, int64_t d, Scratch scratch, acc_t<T>* out) {
  using A = acc_t<T>;
  const int64_t width = padded<A>(d);
  A* h = scratch.take<A>(kCandidates * width);
  A* c = scratch.take<A>(kTile * width);
  double most[kCandidates], not_finite[kCandidates] = {};
  for (double& x : most) x = tokens > 0 ? -__builtin_inf() : 0;
  // Tiles that lack rows repeat the last one
  for (int64_t v = 0; v < whole_tiles(count); ++v) put_unit(hidden + min_(v, count - 1) * d, d, h + v * width);
  for (int64_t t = 0; t < tokens; t += kTile) {
    for (int64_t j = 0; j < kTile; ++j) put_unit(context + min_(t + j, tokens - 1) * d, d, c + j * width);
    for (int64_t v = 0; v < count; v += kTile) {
      double cosines[kTile][kTile];
      products(h + v * width, c, width, cosines);
      for (int64_t i = 0; i < kTile; ++i) {
        for (const double cosine : cosines[i]) {
          most[v + i] = max_(most[v + i], cosine);
          not_finite[v + i] += cosine * 0;
        }
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
