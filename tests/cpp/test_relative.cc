// Relative representations, products of sparse rows, and the score of contrastive search, against loops in double precision.
#include <algorithm>
#include <vector>

#include "check.h"
#include "vlmkernels/contrastive_search_score.h"
#include "vlmkernels/relative_representation.h"
#include "vlmkernels/relative_similarity.h"

namespace {

template <class P>
void test_representation(double p) {
  const int64_t rows = 3, k = 53;
  std::vector<P> s(rows * k), values(rows * k);
  for (int64_t i = 0; i < rows * k; ++i) s[i] = i / k == 1 ? -P(i) : std::sin(P(0.37) * i);
  VLMK_CALL(relative_representation, s.data(), rows, k, p, values.data());
  for (int64_t r = 0; r < rows; ++r) {
    double squares = 0;
    for (int64_t c = 0; c < k; ++c) squares += std::pow(std::max(double(s[r * k + c]), 0.0), 2 * p);
    for (int64_t c = 0; c < k; ++c) {
      const double want = squares > 0 ? std::pow(std::max(double(s[r * k + c]), 0.0), p) / std::sqrt(squares) : 0;
      check("relative representation", values[r * k + c], want, 1e-5);
    }
  }
}

template <class P>
void test_similarity(int64_t count) {
  const int64_t k = 21, l = 34, others = 7, columns = 60;
  std::vector<P> v(count * k), w(others * l), values((count * k + 1) * vlmk::kTableRows), by_table(count * others),
      merged(count * others);
  std::vector<int64_t> at_v(count * k), at_w(others * l);
  for (int64_t i = 0; i < count * k; ++i) v[i] = std::sin(P(0.7) * i), at_v[i] = 2 * (i % k) + i / k % 3;
  for (int64_t i = 0; i < others * l; ++i) w[i] = std::cos(P(0.3) * i), at_w[i] = 2 * (i % l) + i / l % 2;
  std::vector<int32_t> place(columns + 1);
  const vlmk::SparseRows<P> a{v.data(), at_v.data(), k}, b{w.data(), at_w.data(), l};
  const vlmk::SparseTable<P> table{a, count, columns, place.data(), values.data()};
  for (int64_t times = 0; times < 2; ++times) VLMK_CALL(relative_similarity, table, b, others, by_table.data(), others, 1);
  VLMK_CALL(relative_similarity_merged, a, count, b, others, merged.data());
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < others; ++j) {
      double want = 0;
      for (int64_t x = 0; x < k; ++x) {
        for (int64_t y = 0; y < l; ++y) want += at_v[i * k + x] == at_w[j * l + y] ? double(v[i * k + x]) * w[j * l + y] : 0;
      }
      check("relative similarity by table", by_table[i * others + j], want, 1e-5);
      check("relative similarity merged", merged[i * others + j], want, 1e-5);
    }
  }
  for (const int32_t left : place) check("a table's places are cleared", left, 0, 0);
  check("ascending", VLMK_CALL(ascending, at_v.data(), count, k), 1, 0);
  at_v[count * k - 1] = at_v[count * k - 2];
  check("not ascending", VLMK_CALL(ascending, at_v.data(), count, k), 0, 0);
}

template <class P>
void test_score(int64_t tokens) {
  const int64_t k = 9, d = 37;
  std::vector<P> hidden(k * d), context(tokens * d), repetition(k), prob(k), similarity(k);
  for (int64_t i = 0; i < k * d; ++i) hidden[i] = std::sin(P(0.7) * i);
  for (int64_t i = 0; i < tokens * d; ++i) context[i] = std::cos(P(0.31) * i);
  for (int64_t i = 0; i < k; ++i) prob[i] = P(0.1) * (i % 4), similarity[i] = std::sin(P(i));
  const std::vector<P> before = prob;
  std::vector<double> scratch(VLMK_CALL(repetition_bytes<P>, d) / sizeof(double) + 16);
  const auto start = (reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64;
  VLMK_CALL(repetition, hidden.data(), k, context.data(), tokens, d, vlmk::Scratch{reinterpret_cast<char*>(start)},
            repetition.data());
  const int64_t best = VLMK_CALL(contrastive_search_score, prob.data(), repetition.data(), similarity.data(), k, 0.3, 2.0);
  double sum = 0, top = -1e9, first = 0;
  for (int64_t i = 0; i < k; ++i) sum += std::exp(double(similarity[i]));
  for (int64_t i = 0; i < k; ++i) {
    double most = tokens ? -2 : 0, hh = 0;
    for (int64_t c = 0; c < d; ++c) hh += double(hidden[i * d + c]) * hidden[i * d + c];
    for (int64_t j = 0; j < tokens; ++j) {
      double cc = 0, hc = 0;
      for (int64_t c = 0; c < d; ++c) {
        cc += double(context[j * d + c]) * context[j * d + c], hc += double(hidden[i * d + c]) * context[j * d + c];
      }
      most = std::max(most, hc / std::sqrt(hh * cc));
    }
    check("repetition", repetition[i], most, 1e-5);
    const double want = 0.7 * before[i] - 0.3 * most + 2 * std::exp(double(similarity[i])) / sum;
    check("contrastive search score", prob[i], want, 1e-5);
    if (want > top) top = want, first = i;
  }
  check("contrastive search best", best, first, 0);
}

}  // namespace

void test_relative() {
  for (const double p : {8.0, 3.0, 2.5}) test_representation<float>(p), test_representation<double>(p);
  for (const int64_t count : {1, 5, 16}) test_similarity<float>(count), test_similarity<double>(count);
  for (const int64_t tokens : {0, 1, 6}) test_score<float>(tokens), test_score<double>(tokens);
}
