// The kernels without torch: a plain loop computes the tile products, double-precision loops tell the truth.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "vlmkernels/attention.h"
#include "vlmkernels/contrastive_distillation.h"
#include "vlmkernels/distillation.h"
#include "vlmkernels/embedding_distillation.h"
#include "vlmkernels/gated_residual.h"
#include "vlmkernels/info_nce.h"
#include "vlmkernels/sigmoid_loss.h"

namespace {

// n queries and m keys of d features; three tiles a side, the last of them partly filled.
template <class P>
struct Problem {
  static constexpr int64_t n = 290, m = 530, d = 19;
  std::vector<P> q = std::vector<P>(n * d), k = std::vector<P>(m * d), kt, qt;
  vlmk::Pairs<P> pairs{};

  Problem() {
    for (int64_t i = 0; i < n * d; ++i) q[i] = std::sin(P(0.37) * i);
    for (int64_t i = 0; i < m * d; ++i) k[i] = std::cos(P(0.23) * i);
    pairs.n = n, pairs.m = m, pairs.d = pairs.depth = d, pairs.scale = P(1.5);
    kt.resize(pairs.col_blocks() * d * vlmk::kTileCols);
    qt.resize(pairs.row_blocks() * d * vlmk::kTileRows);
    for (int64_t jb = 0; jb < pairs.col_blocks(); ++jb) {
      const int64_t j0 = jb * vlmk::kTileCols, count = std::min(vlmk::kTileCols, m - j0);
      VLMK_CALL(pack_transposed_b, k.data() + j0 * d, d, count, d, d, vlmk::kTileCols, kt.data() + j0 * d);
    }
    for (int64_t ib = 0; ib < pairs.row_blocks(); ++ib) {
      const int64_t i0 = ib * vlmk::kTileRows, count = std::min(vlmk::kTileRows, n - i0);
      VLMK_CALL(pack_transposed_a, q.data() + i0 * d, d, count, d, vlmk::kTileRows, qt.data() + i0 * d);
    }
    pairs.q = q.data(), pairs.k = k.data(), pairs.kt = kt.data(), pairs.qt = qt.data();
    pairs.product = plain_product<P>;
  }

  double logit(int64_t i, int64_t j) const {
    double sum = 0;
    for (int64_t e = 0; e < d; ++e) sum += double(q[i * d + e]) * k[j * d + e];
    return double(pairs.scale) * sum;
  }
};

template <class P>
void test_info_nce(bool store) {
  Problem<P> problem;
  const auto& p = problem.pairs;
  const int64_t n = p.n, m = p.m, d = p.d, tiles = p.row_blocks() * p.col_blocks();
  std::vector<int64_t> positives(n);
  for (int64_t i = 0; i < n; ++i) positives[i] = i % 7 ? i : -1;
  std::vector<P> row(3 * n), col(3 * m), positive(n), scratch(vlmk::kTileRows * vlmk::kTileCols + 3 * vlmk::kTileCols);
  std::vector<double> kept(store ? tiles * vlmk::tile_bytes<P>() / 8 + 8 : 0);
  vlmk::InfoNceStats<P> stats{p,
                              positives.data(),
                              true,
                              3,
                              3,
                              {row.data(), &row[n], &row[2 * n]},
                              {col.data(), &col[m], &col[2 * m]},
                              positive.data(),
                              reinterpret_cast<char*>(kept.data()),
                              store ? tiles : 0};
  VLMK_CALL(info_nce_stats, stats, int64_t(0), int64_t(0), scratch.data());
  const double tolerance = sizeof(P) == 8 ? 1e-11 : 2e-5;
  std::vector<double> r(n), c(m);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) r[i] += std::exp(problem.logit(i, j)), c[j] += std::exp(problem.logit(i, j));
    check("row lse", row[i] + std::log(row[n + i]), r[i] = std::log(r[i]), tolerance);
    if (positives[i] >= 0) check("positive", positive[i], problem.logit(i, positives[i]), tolerance);
  }
  for (int64_t j = 0; j < m; ++j) check("column lse", col[j] + std::log(col[m + j]), c[j] = std::log(c[j]), tolerance);

  std::vector<P> u(n, P(0.5)), v(m, P(0.25)), w(n, P(-2)), row_log(n), col_log(m), dq(n * d), dk(m * d), dots(n + m);
  for (int64_t i = 0; i < n; ++i) row_log[i] = std::log(row[n + i]);
  for (int64_t j = 0; j < m; ++j) col_log[j] = std::log(col[m + j]);
  std::vector<P> key_sums(p.col_blocks() * d * vlmk::kTileCols), sums(vlmk::kTileRows * d), rows(vlmk::kTileCols * d);
  std::vector<P> operand(3 * vlmk::kTileRows * vlmk::kTileCols);
  std::vector<double> workspace(tiles * vlmk::tile_bytes<P>() / 8 + 8);
  vlmk::InfoNceGrads<P> grads{p,
                              positives.data(),
                              row.data(),
                              row_log.data(),
                              u.data(),
                              col.data(),
                              col_log.data(),
                              v.data(),
                              w.data(),
                              reinterpret_cast<char*>(kept.data()),
                              stats.stored_tiles,
                              reinterpret_cast<char*>(workspace.data()),
                              0,
                              p.row_blocks(),
                              key_sums.data(),
                              {problem.q.data(), d, nullptr, nullptr, dq.data(), dots.data()},
                              {problem.k.data(), d, nullptr, nullptr, dk.data(), dots.data() + n}};
  for (int64_t t = stats.stored_tiles; t < tiles; ++t) {
    VLMK_CALL(info_nce_recompute, grads, t / p.col_blocks(), t % p.col_blocks(), scratch.data());
  }
  for (int64_t ib = 0; ib < p.row_blocks(); ++ib)
    VLMK_CALL(info_nce_query, grads, ib, sums.data(), scratch.data(), operand.data());
  for (int64_t jb = 0; jb < p.col_blocks(); ++jb) {
    VLMK_CALL(info_nce_key, grads, jb, int64_t(0), d / 2, false, scratch.data(), operand.data());
    VLMK_CALL(info_nce_key, grads, jb, d / 2, d, false, scratch.data(), operand.data());
    VLMK_CALL(info_nce_finish_key, grads, jb, rows.data());
  }
  std::vector<double> want_q(n * d), want_k(m * d);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      const double s = problem.logit(i, j);
      const double g = j == positives[i] ? -2.0 : 0.5 * std::exp(s - r[i]) + 0.25 * std::exp(s - c[j]);
      for (int64_t e = 0; e < d; ++e) {
        want_q[i * d + e] += p.scale * g * problem.k[j * d + e];
        want_k[j * d + e] += p.scale * g * problem.q[i * d + e];
      }
    }
  }
  for (int64_t i = 0; i < n * d; ++i) check("dq", dq[i], want_q[i], 2 * tolerance);
  for (int64_t i = 0; i < m * d; ++i) check("dk", dk[i], want_k[i], 2 * tolerance);
}

template <class P>
void test_sigmoid_loss() {
  Problem<P> problem;
  const auto& p = problem.pairs;
  const int64_t n = p.n, d = p.d;
  std::vector<int64_t> positives(n);
  for (int64_t i = 0; i < n; ++i) positives[i] = i;
  std::vector<P> u(n, P(0.5)), loss(n), dbias(n), dscale(n), dq(n * d), dots(n), sums(vlmk::kTileRows * d);
  std::vector<P> tiles(p.row_blocks() * p.col_blocks() * vlmk::kTileRows * vlmk::kTileCols);
  std::vector<P> scratch(vlmk::kTileRows * vlmk::kTileCols), operand(2 * vlmk::kTileRows * vlmk::kTileCols);
  vlmk::SigmoidLoss<P> g{p,
                         P(-1),
                         positives.data(),
                         nullptr,
                         nullptr,
                         u.data(),
                         true,
                         true,
                         p.col_blocks(),
                         loss.data(),
                         dbias.data(),
                         dscale.data(),
                         tiles.data(),
                         0,
                         p.row_blocks(),
                         nullptr,
                         {problem.q.data(), d, nullptr, nullptr, dq.data(), dots.data()},
                         {}};
  for (int64_t ib = 0; ib < p.row_blocks(); ++ib) {
    VLMK_CALL(sigmoid_loss_tiles, g, ib, int64_t(0), scratch.data());
    VLMK_CALL(sigmoid_loss_query, g, ib, sums.data(), operand.data());
  }
  const double tolerance = sizeof(P) == 8 ? 1e-9 : 2e-3;
  for (int64_t i = 0; i < n; ++i) {
    double want = 0, bias = 0;
    std::vector<double> grad(d);
    for (int64_t j = 0; j < p.m; ++j) {
      const double t = i == j ? 1 : -1, z = t * (problem.logit(i, j) - 1), dz = -0.5 * t / (1 + std::exp(z));
      want += std::log1p(std::exp(-std::fabs(z))) + std::fmax(-z, 0);
      bias += dz;
      for (int64_t e = 0; e < d; ++e) grad[e] += double(p.scale) * dz * problem.k[j * d + e];
    }
    check("sigmoid loss", loss[i], want, tolerance);
    check("dbias", dbias[i], bias, tolerance);
    for (int64_t e = 0; e < d; ++e) check("sigmoid dq", dq[i * d + e], grad[e], tolerance);
  }
}

// The student's problem, and the teacher's logits: those of its features the other way round, at a scale that spreads them.
template <class P>
void test_contrastive_distillation(bool store, P teacher_scale) {
  Problem<P> problem, other;
  for (P& x : other.q) x = -x;
  other.pairs.scale = teacher_scale;
  const auto& p = problem.pairs;
  const int64_t n = p.n, m = p.m, d = p.d, tiles = p.row_blocks() * p.col_blocks(), tile = vlmk::kTileSize;
  std::vector<P> maxima(2 * (n + m)), kept(store ? 2 * tile * tiles : 0), scratch(2 * tile), loss(n + m), out(5 * (n + m));
  std::vector<double> sums(5 * (n + m));
  const auto rows = vlmk::logit_sums(maxima.data(), sums.data(), n);
  const auto cols = vlmk::logit_sums(&maxima[2 * n], &sums[5 * n], m);
  vlmk::ContrastiveDistillationStats<P> stats{p, other.pairs, true, 3, 3, rows, cols, kept.data(), store ? tiles : 0};
  VLMK_CALL(contrastive_distillation_stats, stats, int64_t(0), int64_t(0), scratch.data());
  P *row = out.data(), *col = &out[5 * n];
  VLMK_CALL(contrastive_distillation_merge, rows, int64_t(1), n, int64_t(0), n, false, loss.data(), row);
  VLMK_CALL(contrastive_distillation_merge, cols, int64_t(1), m, int64_t(0), m, true, &loss[n], col);

  // Logits and the softmaxes along the rows and the columns, of both.
  std::vector<double> s(n * m), t(n * m), g(n * m);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) s[i * m + j] = problem.logit(i, j), t[i * m + j] = other.logit(i, j);
  }
  const double tolerance = sizeof(P) == 8 ? 1e-10 : 1e-4;
  const auto along = [&](int64_t count, int64_t others, int64_t step, int64_t jump, double coef, bool cross_entropy,
                         const P* losses) {
    for (int64_t i = 0; i < count; ++i) {
      double s_max = -INFINITY, t_max = -INFINITY, s_sum = 0, t_sum = 0, want = 0;
      const auto at = [&](int64_t j) { return i * step + j * jump; };
      for (int64_t j = 0; j < others; ++j) s_max = std::fmax(s_max, s[at(j)]), t_max = std::fmax(t_max, t[at(j)]);
      for (int64_t j = 0; j < others; ++j) s_sum += std::exp(s[at(j)] - s_max), t_sum += std::exp(t[at(j)] - t_max);
      for (int64_t j = 0; j < others; ++j) {
        const double log_s = s[at(j)] - s_max - std::log(s_sum), log_p = t[at(j)] - t_max - std::log(t_sum);
        want += std::exp(log_p) * ((cross_entropy ? 0 : log_p) - log_s);
        g[at(j)] += coef * (std::exp(log_s) - std::exp(log_p));
      }
      check("distillation", losses[i], want, tolerance);
    }
  };
  along(n, m, m, 1, 0.5, false, loss.data());
  along(m, n, 1, m, 0.25, true, &loss[n]);

  std::vector<P> u(n, P(0.5)), v(m, P(0.25)), dq(n * d), dk(m * d), dots(n + m), gradient(tiles * tile), operand(tile);
  std::vector<P> key_sums(p.col_blocks() * d * vlmk::kTileCols), row_sums(vlmk::kTileRows * d), col_sums(vlmk::kTileCols * d);
  vlmk::ContrastiveDistillationGrads<P> grads{p,
                                              other.pairs,
                                              {row, row + n, row + 2 * n, row + 3 * n},
                                              {col, col + m, col + 2 * m, col + 3 * m},
                                              u.data(),
                                              v.data(),
                                              kept.data(),
                                              stats.stored_tiles,
                                              gradient.data(),
                                              0,
                                              p.row_blocks(),
                                              key_sums.data(),
                                              {problem.q.data(), d, nullptr, nullptr, dq.data(), dots.data()},
                                              {problem.k.data(), d, nullptr, nullptr, dk.data(), &dots[n]}};
  for (int64_t i = 0; i < tiles; ++i) {
    VLMK_CALL(contrastive_distillation_tile, grads, i / p.col_blocks(), i % p.col_blocks(), scratch.data());
  }
  for (int64_t ib = 0; ib < p.row_blocks(); ++ib) VLMK_CALL(contrastive_distillation_query, grads, ib, row_sums.data());
  for (int64_t jb = 0; jb < p.col_blocks(); ++jb) {
    VLMK_CALL(contrastive_distillation_key, grads, jb, int64_t(0), d / 2, false, operand.data());
    VLMK_CALL(contrastive_distillation_key, grads, jb, d / 2, d, false, operand.data());
    VLMK_CALL(contrastive_distillation_finish_key, grads, jb, col_sums.data());
  }
  std::vector<double> want_q(n * d), want_k(m * d);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      for (int64_t e = 0; e < d; ++e) {
        want_q[i * d + e] += p.scale * g[i * m + j] * problem.k[j * d + e];
        want_k[j * d + e] += p.scale * g[i * m + j] * problem.q[i * d + e];
      }
    }
  }
  for (int64_t i = 0; i < n * d; ++i) check("distillation dq", dq[i], want_q[i], tolerance);
  for (int64_t i = 0; i < m * d; ++i) check("distillation dk", dk[i], want_k[i], tolerance);
}

// Two query heads over one key head, two sources, some queries without keys; tiles, chunks and the path for few queries.
template <class P>
void test_attention(int64_t tq, int64_t chunks) {
  constexpr int64_t heads = 2, dh = 5, dv = 3, counts[2] = {200, 70};
  const double tolerance = sizeof(P) == 8 ? 1e-9 : 1e-4;
  const auto filled = [](int64_t count, double step) {
    std::vector<P> x(count);
    for (int64_t i = 0; i < count; ++i) x[i] = P(std::sin(step * i));
    return x;
  };
  const auto q = filled(heads * tq * dh, 0.7), dout = filled(heads * tq * dv, 0.43);
  std::vector<P> k[2], v[2], dk[2], dv_[2], out(heads * tq * dv), lse(heads * tq), dq(heads * tq * dh);
  std::vector<int32_t> begin[2], end[2];
  vlmk::AttentionGrads<P> grads{};
  vlmk::Attention<P>& g = grads.attention;
  g.batch = 1, g.heads = heads, g.kv_heads = 1, g.tq = tq, g.dh = g.depth = dh, g.dv = g.width = dv;
  g.q = {q.data(), 0, tq * dh, dh};
  g.sources = 2, g.key_block = 128, g.once = tq <= 2 * vlmk::kQueryBlock, g.scale = P(0.8), g.product = plain_product<P>;
  g.out = {out.data(), 0, tq * dv, dv}, g.lse = lse.data();
  for (int64_t n = 0; n < 2; ++n) {
    k[n] = filled(counts[n] * dh, 0.31 + n), v[n] = filled(counts[n] * dv, 0.57 + n);
    dk[n].resize(counts[n] * dh), dv_[n].resize(counts[n] * dv);
    for (int64_t i = 0; i < tq; ++i) {
      const bool empty = i % 5 == 3;
      begin[n].push_back(empty ? 1 : int32_t(i * 37 % counts[n] / 2));
      end[n].push_back(empty ? 0 : int32_t(begin[n][i] + 1 + i * 53 % (counts[n] / 2)));
    }
    g.source[n] = {{k[n].data(), 0, 0, dh},  {v[n].data(), 0, 0, dv},  counts[n], begin[n].data(), end[n].data(), 0,
                   {dk[n].data(), 0, 0, dh}, {dv_[n].data(), 0, 0, dv}};
  }
  std::vector<double> scratch(VLMK_CALL(attention_forward_scratch, g) / 8 + VLMK_CALL(attention_rows_scratch, g) / 8 + 16);
  const auto aligned = [](std::vector<double>& memory) {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  };
  for (int64_t h = 0; h < heads; ++h) {
    if (tq <= 4) {
      VLMK_CALL(attention_rows, g, int64_t(0), h, aligned(scratch));
    } else {
      for (int64_t part = 0; part < 2; ++part)
        VLMK_CALL(attention_forward, g, int64_t(0), h, part, int64_t(2), aligned(scratch));
    }
  }
  const int64_t blocks = (tq + vlmk::kQueryBlock - 1) / vlmk::kQueryBlock;
  std::vector<P> parts(chunks * heads * blocks * dh * vlmk::kQueryBlock), joined(2 * dh * vlmk::kQueryBlock);
  std::vector<uint8_t> touched(chunks * heads * blocks);
  grads.dout = {dout.data(), 0, tq * dv, dv}, grads.dq = {dq.data(), 0, tq * dh, dh};
  grads.need_q = grads.need_k = grads.need_v = true;
  grads.chunks = chunks, grads.key_chunk = vlmk::kGradKeys;
  grads.dq_parts = parts.data(), grads.dq_touched = touched.data();
  scratch.resize(VLMK_CALL(attention_backward_scratch, grads) / 8 + 16);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    VLMK_CALL(attention_backward, grads, int64_t(0), int64_t(0), chunk, aligned(scratch));
  }
  for (int64_t task = 0; chunks > 1 && task < heads * blocks; ++task) {
    VLMK_CALL(attention_join_query, grads, int64_t(0), task / blocks, task % blocks, joined.data());
  }
  std::vector<double> want_k[2] = {std::vector<double>(counts[0] * dh), std::vector<double>(counts[1] * dh)};
  std::vector<double> want_v[2] = {std::vector<double>(counts[0] * dv), std::vector<double>(counts[1] * dv)};
  for (int64_t row = 0; row < heads * tq; ++row) {
    const int64_t i = row % tq;
    struct Seen {
      int64_t n, j;
      double p;
    };
    std::vector<Seen> seen;
    double total = 0, want[dv] = {}, want_q[dh] = {}, slope = 0;
    for (int64_t n = 0; n < 2; ++n) {
      for (int64_t j = begin[n][i]; j < end[n][i]; ++j) {
        double dot = 0;
        for (int64_t e = 0; e < dh; ++e) dot += double(q[row * dh + e]) * k[n][j * dh + e];
        seen.push_back({n, j, std::exp(double(g.scale) * dot)});
        total += seen.back().p;
      }
    }
    for (Seen& s : seen) {
      s.p /= total;
      for (int64_t e = 0; e < dv; ++e) want[e] += s.p * v[s.n][s.j * dv + e];
    }
    for (int64_t e = 0; e < dv; ++e) {
      check("attention", out[row * dv + e], want[e], tolerance);
      slope += want[e] * dout[row * dv + e];
    }
    if (seen.empty()) {
      check("attention lse of nothing", std::isinf(lse[row]) && lse[row] < 0, 1, 0);
    } else {
      check("attention lse", lse[row], std::log(total), tolerance);
    }
    for (const Seen& s : seen) {
      double dp = 0;
      for (int64_t e = 0; e < dv; ++e) dp += double(dout[row * dv + e]) * v[s.n][s.j * dv + e];
      const double ds = double(g.scale) * s.p * (dp - slope);
      for (int64_t e = 0; e < dh; ++e) want_q[e] += ds * k[s.n][s.j * dh + e];
      for (int64_t e = 0; e < dh; ++e) want_k[s.n][s.j * dh + e] += ds * q[row * dh + e];
      for (int64_t e = 0; e < dv; ++e) want_v[s.n][s.j * dv + e] += s.p * dout[row * dv + e];
    }
    for (int64_t e = 0; e < dh; ++e) check("attention dq", dq[row * dh + e], want_q[e], tolerance);
  }
  for (int64_t n = 0; n < 2; ++n) {
    for (int64_t i = 0; i < counts[n] * dh; ++i) check("attention dk", dk[n][i], want_k[n][i], tolerance);
    for (int64_t i = 0; i < counts[n] * dv; ++i) check("attention dv", dv_[n][i], want_v[n][i], tolerance);
  }
}

// Rows of two pieces, whose maxima rise; the second row is ignored.
void test_distillation() {
  const int64_t rows = 3, v = 2100, ignored = -1;
  std::vector<float> student(rows * v), teacher(rows * v), stats(rows * 6), loss(rows), grad(rows * v), formed(rows * v);
  for (int64_t i = 0; i < rows * v; ++i) {
    student[i] = 3 * std::sin(0.7f * i) + 0.01f * (i % v), teacher[i] = 3 * std::cos(0.3f * i) + 0.01f * (i % v);
  }
  const int64_t target[rows] = {2050, ignored, 7};
  const float one = 1;
  const double t = 2, beta = 0.3, hard = 0.25;
  vlmk::Scratch measured{nullptr};
  vlmk::KeptRow<float>(measured, v);
  std::vector<char> memory(reinterpret_cast<intptr_t>(measured.next));
  vlmk::Scratch scratch{memory.data()};
  const vlmk::KeptRow<float> kept(scratch, v);
  for (const vlmk::Divergence form : {vlmk::Divergence::forward_kl, vlmk::Divergence::reverse_kl, vlmk::Divergence::jsd}) {
    const vlmk::Distillation<float> g{student.data(), teacher.data(), target, stats.data(), v,   v, v,
                                      ignored,        form,           t,      beta,         hard};
    VLMK_CALL(distillation, g, 0, rows, loss.data());
    VLMK_CALL(distillation_bwd, g, 0, rows, &one, true, 0.5, grad.data());
    VLMK_CALL(distillation_formed, g, 0, rows, loss.data(), 0.5, formed.data(), kept);
    for (int64_t r = 0; r < rows; ++r) {
      double sums[3] = {}, terms[3] = {};
      const float *z = student.data() + r * v, *q = teacher.data() + r * v;
      for (int64_t c = 0; c < v; ++c)
        sums[0] += std::exp(z[c] / t), sums[1] += std::exp(q[c] / t), sums[2] += std::exp(double(z[c]));
      for (int64_t c = 0; c < v; ++c) {
        const double s = std::exp(z[c] / t) / sums[0], p = std::exp(q[c] / t) / sums[1], m = beta * p + (1 - beta) * s;
        terms[0] += p * std::log(p / s), terms[1] += s * std::log(s / p), terms[2] += (1 - beta) * s * std::log(s / m);
        if (form == vlmk::Divergence::jsd) terms[0] += beta * p * std::log(p / m) - p * std::log(p / s);
      }
      const double d = form == vlmk::Divergence::reverse_kl ? terms[1]
                       : form == vlmk::Divergence::jsd      ? terms[0] + terms[2]
                                                            : terms[0];
      const bool counted = target[r] != ignored;
      const double ce = counted ? std::log(sums[2]) - z[target[r]] : 0;
      check("distillation", loss[r], counted ? (1 - hard) * t * t * d + hard * ce : 0, 1e-5);
      for (int64_t c = 0; c < v; ++c) {
        const double s = std::exp(z[c] / t) / sums[0], p = std::exp(q[c] / t) / sums[1], m = beta * p + (1 - beta) * s;
        const double slope = form == vlmk::Divergence::forward_kl ? s - p
                             : form == vlmk::Divergence::reverse_kl
                                 ? s * (std::log(s / p) - terms[1])
                                 : (1 - beta) * s * (std::log(s / m) - terms[2] / (1 - beta));
        const double of_target = std::exp(double(z[c])) / sums[2] - (c == target[r]);
        const double want = counted ? 0.5 * ((1 - hard) * t * slope + hard * of_target) : 0;
        check("distillation dstudent", grad[r * v + c], want, 1e-6);
        check("distillation dstudent formed", formed[r * v + c], want, 1e-6);
      }
    }
  }
}

void test_embedding_distillation() {
  const int64_t rows = 3, d = 37;
  std::vector<float> student(rows * d), teacher(rows * d), loss(rows), grad(rows * d), formed(rows * d);
  for (int64_t i = 0; i < rows * d; ++i) student[i] = std::sin(0.7f * i), teacher[i] = std::cos(0.3f * i);
  const float weight[rows] = {1, 0, 3}, one = 1;
  const vlmk::EmbeddingDistillation<float> g{student.data(), teacher.data(), weight, d, vlmk::Distance::l2, true};
  VLMK_CALL(embedding_distillation, g, 0, rows, loss.data(), 0.5, formed.data());
  VLMK_CALL(embedding_distillation_bwd, g, 0, rows, &one, true, 0.5, grad.data());
  for (int64_t r = 0; r < rows; ++r) {
    double ss = 0, tt = 0, st = 0;
    const float *x = student.data() + r * d, *y = teacher.data() + r * d;
    for (int64_t c = 0; c < d; ++c) ss += double(x[c]) * x[c], tt += double(y[c]) * y[c], st += double(x[c]) * y[c];
    const double norm = std::sqrt(ss), cosine = st / (norm * std::sqrt(tt));
    check("embedding distillation", loss[r], weight[r] * (2 - 2 * cosine), 1e-5);
    for (int64_t c = 0; c < d; ++c) {
      const double slope = -2 * (y[c] / std::sqrt(tt) - cosine * x[c] / norm) / norm;
      check("embedding distillation dstudent", grad[r * d + c], 0.5 * weight[r] * slope, 1e-6);
      check("embedding distillation dstudent formed", formed[r * d + c], 0.5 * weight[r] * slope, 1e-6);
    }
  }
}

// Three parts of the depth, two blocks of columns; rows 1 .. n of x, of which row 0 is masked.
void test_bfloat16_rounding() {
  std::vector<float> zero(8, 0.0f);
  for (uint32_t step = 0; step < 40000; ++step) {
    float x[1];
    const uint32_t bits = step * 104729u + (step << 16);
    __builtin_memcpy(x, &bits, 4);
    if (!std::isfinite(x[0]) || std::fabs(x[0]) < 1e-30f) continue;
    const float gate[1] = {1.0f};
    vlmk::bf16 in[1] = {{static_cast<uint16_t>(bits >> 16)}}, none[1] = {{0}}, out[1];
    VLMK_CALL(gated_residual, in, none, gate, static_cast<const bool*>(nullptr), out, int64_t(1), int64_t(1));
    check("bfloat16 round trip", out[0].bits, in[0].bits, 0);
  }
}

}  // namespace

int main() {
  try {
    std::printf("instruction set %s\n", vlmk::isa_name(vlmk::isa()));
  } catch (const std::runtime_error& error) {
    std::printf("skipped: %s\n", error.what());
    return 77;
  }
  for (bool store : {true, false}) test_info_nce<float>(store), test_info_nce<double>(store);
  for (bool store : {true, false}) {
    for (float teacher_scale : {0.5f, 4.0f}) {
      test_contrastive_distillation<float>(store, teacher_scale), test_contrastive_distillation<double>(store, teacher_scale);
    }
  }
  test_sigmoid_loss<float>();
  test_sigmoid_loss<double>();
  for (int64_t tq : {3, 64, 150}) {
    for (int64_t chunks : {1, 2}) test_attention<float>(tq, chunks), test_attention<double>(tq, chunks);
  }
  test_residual();
  test_distillation();
  test_embedding_distillation();
  test_dense_layers();
  test_detection();
  test_relative();
  test_retrieval();
  test_bfloat16_rounding();
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures != 0;
}
