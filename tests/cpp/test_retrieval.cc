// Retrieval: lists of the best, few queries and tiles of them, ranks, hard negatives. Features are small integers, whose
// products are exact and often equal.
#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "vlmkernels/mine_hard_negatives.h"
#include "vlmkernels/retrieval_ranks.h"
#include "vlmkernels/topk_similarity.h"

namespace {

// Two blocks of queries and two tiles of keys, the last of each partly filled; key 70 is NaN.
template <class P>
struct Searched {
  static constexpr int64_t n = 300, m = 190, d = 21, k = 9, width = vlmk::kTileCols, room = 20;
  std::vector<P> q = std::vector<P>(n * d), keys = std::vector<P>(m * d), qt, operand, tile;
  std::vector<int64_t> query_labels = std::vector<int64_t>(n), key_labels = std::vector<int64_t>(m);
  vlmk::Similarities<P> g{};
  std::vector<vlmk::Found<P>> found = std::vector<vlmk::Found<P>>(2 * width * room);
  std::vector<int64_t> held = std::vector<int64_t>(2 * width);
  std::vector<P> least = std::vector<P>(2 * width, std::nan(""));
  vlmk::Best<P> best{2 * width, k, room, found.data(), held.data(), least.data()};

  Searched() : qt(2 * width * d), operand(vlmk::kTileRows * d), tile(vlmk::kTileSize) {
    for (int64_t i = 0; i < n * d; ++i) q[i] = P(i * i % 7 % 5 - 2);
    for (int64_t j = 0; j < m * d; ++j) keys[j] = P(j * 3 % 11 % 5 - 2);
    keys[70 * d] = std::nan("");
    for (int64_t i = 0; i < n; ++i) query_labels[i] = i % 13;
    for (int64_t j = 0; j < m; ++j) key_labels[j] = j % 17;
    for (int64_t block = 0; block < 2; ++block) {
      const int64_t i0 = block * width, count = std::min(width, n - i0);
      VLMK_CALL(pack_transposed_b, q.data() + i0 * d, d, count, d, d, width, qt.data() + i0 * d);
    }
    g = {n, d, d, width, qt.data(), nullptr, plain_product<P>};
  }
  double score(int64_t i, int64_t j) const {
    double sum = 0;
    for (int64_t e = 0; e < d; ++e) sum += double(q[i * d + e]) * keys[j * d + e];
    return sum;
  }
  vlmk::Labels labels() const { return {query_labels.data(), key_labels.data()}; }
  // Calls f(i0, cols, j0, rows) with the tile.
  template <class F>
  void for_tiles(F f) {
    for (int64_t j0 = 0; j0 < m; j0 += vlmk::kTileRows) {
      const int64_t rows = std::min(vlmk::kTileRows, m - j0);
      VLMK_CALL(retrieval_rows, keys.data() + j0 * d, rows, d, vlmk::kTileRows, d, operand.data());
      for (int64_t block = 0; block < 2; ++block) {
        VLMK_CALL(retrieval_tile, g, block, operand.data(), rows, static_cast<const P*>(nullptr), tile.data());
        f(block * width, std::min(width, n - block * width), j0, rows);
      }
    }
  }
  // The k best indices of query i among those that are `allowed`, NaN last.
  template <class Allowed>
  std::vector<int64_t> wanted(int64_t i, Allowed allowed) const {
    std::vector<int64_t> order;
    for (int64_t j = 0; j < m; ++j) {
      if (allowed(j)) order.push_back(j);
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      const double x = score(i, a), y = score(i, b);
      return x != x ? false : y != y ? true : x > y;
    });
    order.resize(k, -1);
    return order;
  }
};

// Small integers, whose sums are exact: every number of rows and of columns that is left, and more than one part of the depth.
void test_tile_product() {
  for (const int64_t m : {1, 2, 3, 4, 5, 6, 12, 13, 29}) {
    for (const int64_t n : {1, 16, 21, 64, 67}) {
      for (const int64_t k : {0, 1, 256, 300}) {
        for (const bool accumulate : {false, true}) {
          const int64_t lda = k + 3, ldb = n + 5, ldc = n + 2;
          std::vector<float> a(m * lda), b(k * ldb + 1), got(m * ldc), want;
          for (size_t i = 0; i < a.size(); ++i) a[i] = float(i * 7 % 5) - 2;
          for (size_t i = 0; i < b.size(); ++i) b[i] = float(i * 11 % 7) - 3;
          for (size_t i = 0; i < got.size(); ++i) got[i] = float(i % 9);
          want = got;
          plain_product<float>(m, n, k, lda, ldb, ldc, accumulate, a.data(), b.data(), want.data());
          VLMK_CALL(tile_product, m, n, k, lda, ldb, ldc, accumulate, a.data(), b.data(), got.data());
          for (size_t i = 0; i < got.size(); ++i) check("tile product", got[i], want[i], 0);
        }
      }
    }
  }
}

template <class P>
void test_topk() {
  Searched<P> s;
  constexpr int64_t n = s.n, m = s.m, k = s.k, few = 3;
  std::vector<vlmk::Found<P>> scratch(s.room + m);
  std::vector<P> values(k), scores(few * vlmk::kFewKeys), widened(vlmk::kFewKeys * s.d);
  std::vector<int64_t> indices(k);
  const auto check_rows = [&](const char* what, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      VLMK_CALL(topk_finish, &s.best, int64_t(1), i, k, m, true, scratch.data(), values.data(), indices.data());
      const auto want = s.wanted(i, [](int64_t) { return true; });
      for (int64_t j = 0; j < k; ++j) {
        check(what, indices[j], want[j], 0);
        check(what, values[j], s.score(i, want[j]), 0);
      }
    }
    std::fill(s.held.begin(), s.held.end(), 0);
    std::fill(s.least.begin(), s.least.end(), P(std::nan("")));
  };
  s.for_tiles([&](int64_t i0, int64_t cols, int64_t j0, int64_t rows) {
    VLMK_CALL(topk_columns, s.best, i0, s.tile.data(), s.width, rows, cols, j0);
  });
  check_rows("top k of tiles", n);
  for (int64_t j0 = 0; j0 < m; j0 += vlmk::kFewKeys) {
    const int64_t count = std::min(vlmk::kFewKeys, m - j0);
    const P* none = nullptr;
    VLMK_CALL(retrieval_few, s.q.data(), few, s.keys.data() + j0 * s.d, count, s.d, none, none, widened.data(), scores.data(),
              vlmk::kFewKeys);
    VLMK_CALL(topk_rows, s.best, int64_t(0), scores.data(), vlmk::kFewKeys, few, count, j0);
  }
  check_rows("top k of few", few);
  std::vector<int8_t> small(m * s.d);
  std::vector<P> b(vlmk::kFewKeys), scale(m, P(-0.5));
  for (int64_t j = 0; j < m * s.d; ++j) small[j] = j / s.d == 70 ? 0 : static_cast<int8_t>(s.keys[j]);
  VLMK_CALL(retrieval_factors, small.data(), vlmk::kFewKeys, s.d, scale.data(), true, b.data());
  VLMK_CALL(retrieval_few, s.q.data(), int64_t(1), small.data(), vlmk::kFewKeys, s.d, static_cast<const P*>(nullptr), b.data(),
            widened.data(), scores.data(), vlmk::kFewKeys);
  for (int64_t j = 0; j < vlmk::kFewKeys; ++j) {
    double square = 0;
    for (int64_t e = 0; e < s.d; ++e) square += double(small[j * s.d + e]) * small[j * s.d + e];
    check("scores of int8 keys", scores[j], -s.score(0, j) / std::sqrt(square), 1e-5);
  }
}

template <class P>
void test_ranks_and_hard_negatives() {
  Searched<P> s;
  constexpr int64_t n = s.n, m = s.m, k = s.k;
  std::vector<P> score(n + m, P(-INFINITY));
  std::vector<uint8_t> any(n + m);
  const vlmk::BestMatch<P> queries{score.data(), any.data()}, keys{score.data() + n, any.data() + n};
  s.for_tiles([&](int64_t i0, int64_t cols, int64_t j0, int64_t rows) {
    VLMK_CALL(retrieval_best, s.labels(), i0, cols, j0, rows, s.tile.data(), s.width, queries, keys);
  });
  std::vector<int64_t> counts(n + m);
  s.for_tiles([&](int64_t i0, int64_t cols, int64_t j0, int64_t rows) {
    const bool some = VLMK_CALL(retrieval_any_match, s.labels(), i0, cols, j0, rows);
    VLMK_CALL(retrieval_ranks_count, s.labels(), some, i0, cols, j0, rows, s.tile.data(), s.width, queries.score, keys.score,
              counts.data(), counts.data() + n);
  });
  const auto match = [&](int64_t i, int64_t j) { return s.query_labels[i] == s.key_labels[j]; };
  std::vector<double> best(n, -INFINITY);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      const double x = s.score(i, j);
      if (match(i, j) && (x > best[i] || x != x)) best[i] = x;
    }
    int64_t count = 0;
    for (int64_t j = 0; j < m; ++j) count += !match(i, j) && !(s.score(i, j) < best[i]);
    check("rank of a query", counts[i], count, 0);
  }
  for (int64_t j = 0; j < m; ++j) {
    double top = -INFINITY;
    for (int64_t i = 0; i < n; ++i) {
      const double x = s.score(i, j);
      if (match(i, j) && (x > top || x != x)) top = x;
    }
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += !match(i, j) && !(s.score(i, j) < top);
    check("rank of a key", counts[n + j], count, 0);
  }
  std::vector<P> limit(n);
  for (int64_t i = 0; i < n; ++i) limit[i] = score[i] - P(3);
  const vlmk::Candidates<P> g{s.labels(), {nullptr, nullptr}, limit.data(), any.data()};
  s.for_tiles([&](int64_t i0, int64_t cols, int64_t j0, int64_t rows) {
    VLMK_CALL(mine_hard_negatives_offer, g, s.best, i0, i0, cols, j0, rows, s.tile.data(), s.width);
  });
  std::vector<vlmk::Found<P>> scratch(s.room + m);
  std::vector<int64_t> indices(k);
  for (int64_t i = 0; i < n; ++i) {
    VLMK_CALL(mine_hard_negatives_finish, g, &s.best, int64_t(1), i, i, m, k, scratch.data(), indices.data());
    const auto want = s.wanted(i, [&](int64_t j) { return !match(i, j) && s.score(i, j) <= best[i] - 3; });
    for (int64_t j = 0; j < k; ++j) check("hard negative", indices[j], want[j], 0);
  }
}

}  // namespace

void test_retrieval() {
  test_tile_product();
  test_topk<float>();
  test_topk<double>();
  test_ranks_and_hard_negatives<float>();
  test_ranks_and_hard_negatives<double>();
}
