// Dense layers: what follows a product, in blocks, for few rows and for one.
#include <algorithm>
#include <vector>

#include "check.h"
#include "vlmkernels/dense.h"
#include "vlmkernels/gated_linear_residual.h"

namespace {

// The rows of w [o, k] as B operand.
template <class P>
std::vector<P> transposed(const std::vector<P>& w, int64_t o, int64_t k) {
  constexpr int64_t width = vlmk::kBlockCols<P>;
  std::vector<P> out(vlmk::ceil_div(o, width) * k * width);
  for (int64_t o0 = 0; o0 < o; o0 += width) {
    VLMK_CALL(pack_transposed_b, w.data() + o0 * k, k, std::min(width, o - o0), k, k, width, out.data() + o0 * k);
  }
  return out;
}

template <class P>
vlmk::Stored stored(std::vector<P>& v) {
  return {v.data(), sizeof(P) == 8 ? vlmk::Storage::f64 : vlmk::Storage::f32};
}

template <class P>
void test_gated_linear_residual() {
  constexpr int64_t n = 9, d = 70, k = 1040, width = vlmk::kBlockCols<P>, blocks = vlmk::ceil_div(d, width);
  const double tolerance = sizeof(P) == 8 ? 1e-11 : 2e-4;
  std::vector<P> h(n * k), w(d * k), t(d), x((n + 1) * d), out((n + 1) * d);
  std::vector<P> tiles(vlmk::kBlockRows<P> * 1088), turned(d * 64), products(d * k), part(17 * d);
  std::vector<int64_t> index(n);
  for (int64_t i = 0; i < n * k; ++i) h[i] = std::sin(P(0.37) * i);
  for (int64_t i = 0; i < d * k; ++i) w[i] = std::cos(P(0.23) * i) / 8;
  for (int64_t i = 0; i < (n + 1) * d; ++i) x[i] = std::sin(P(0.7) * i);
  for (int64_t c = 0; c < d; ++c) t[c] = P(0.01) * c;
  for (int64_t r = 0; r < n; ++r) index[r] = r + 1;
  const auto branch = [&](int64_t r, int64_t c) {
    double sum = 0;
    for (int64_t e = 0; e < k; ++e) sum += double(h[r * k + e]) * w[c * k + e];
    return sum;
  };
  const vlmk::LinearOutput<P> g{.o = d, .residual = stored(x), .out = stored(out), .t = t.data(), .index = index.data()};
  const auto check_out = [&](const char* what, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < d; ++c) check(what, out[(r + 1) * d + c], x[(r + 1) * d + c] + t[c] * branch(r, c), tolerance);
    }
    std::fill(out.begin(), out.end(), P(0));
  };

  const std::vector<P> wt = transposed(w, d, k);
  vlmk::BlockProduct<P> p{plain_product<P>, h.data(),     wt.data(), n, k, width, k, vlmk::kBlockDepth, width, 0,
                          blocks,           tiles.data(), nullptr};
  VLMK_CALL(linear, p, g, int64_t(0), n);
  check_out("gated linear residual", n);

  std::vector<P> ht(k * 16);
  VLMK_CALL(pack_transposed_b, h.data(), k, n, k, k, int64_t(16), ht.data());
  p = {plain_product<P>, w.data(), ht.data(), d, k, 16, k, vlmk::kBlockDepth, 16, 0, 1, tiles.data(), nullptr};
  VLMK_CALL(linear_few, p, g, int64_t(0), d, n, turned.data());
  check_out("gated linear residual, few rows", n);
  VLMK_CALL(linear_row, g, h.data(), w.data(), k, int64_t(0), d);
  check_out("gated linear residual, one row", 1);

  const int64_t wide = vlmk::ceil_div(k, width);
  std::vector<P> packed(wide * d * width), hs((n + 1) * k), dh((n + 1) * k);
  std::copy(h.begin(), h.end(), hs.begin() + k);
  for (int64_t k0 = 0; k0 < k; k0 += width) {
    VLMK_CALL(pack_columns_b, w.data() + k0, k, t.data(), std::min(width, k - k0), d, d, packed.data() + k0 * d);
  }
  std::vector<double> dots(wide);
  const vlmk::GatedLinearInput<P, P> to_h{k, index.data(), P(2), hs.data(), dh.data(), dots.data()};
  p = {plain_product<P>, x.data() + d, packed.data(), n, d, width, d, vlmk::kBlockDepth, width, 0, wide, tiles.data(), nullptr};
  VLMK_CALL(gated_linear_residual_dh, p, to_h, int64_t(0), n);
  double dot = 0;
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t e = 0; e < k; ++e) {
      double want = 0;
      for (int64_t c = 0; c < d; ++c) want += double(x[(r + 1) * d + c]) * t[c] * w[c * k + e];
      check("gated linear residual dh", dh[(r + 1) * k + e], 2 * want, tolerance);
      dot += want * h[r * k + e];
    }
  }
  for (double block : dots) dot -= block;
  check("gated linear residual dot", dot, 0, 10 * tolerance);

  // Rows in two calls, the second of which finishes.
  const vlmk::GatedLinearWeight<P, P> to_w{d, k, t.data(), w.data(), products.data(), products.data(), part.data()};
  for (int64_t first : {int64_t(0), n / 2}) {
    const int64_t rows = first ? n - first : n / 2;
    std::vector<P> a(d * rows), b(wide * rows * width);
    VLMK_CALL(pack_transposed_a, x.data() + (first + 1) * d, d, rows, d, rows, a.data());
    for (int64_t k0 = 0; k0 < k; k0 += width) {
      VLMK_CALL(pack_columns_b, h.data() + first * k + k0, k, static_cast<const P*>(nullptr), std::min(width, k - k0), rows,
                rows, b.data() + k0 * rows);
    }
    p = {plain_product<P>, a.data(), b.data(), d, rows, width, rows, rows * d, width, 0, wide, tiles.data(), nullptr};
    VLMK_CALL(gated_linear_residual_dw, p, to_w, int64_t(0), d, first > 0, first > 0);
  }
  for (int64_t c = 0; c < d; ++c) {
    double total = 0;
    for (int64_t e = 0; e < k; ++e) {
      double want = 0;
      for (int64_t r = 0; r < n; ++r) want += double(x[(r + 1) * d + c]) * h[r * k + e];
      check("gated linear residual dw", products[c * k + e], t[c] * want, tolerance);
      total += want * w[c * k + e];
    }
    for (int64_t b = 0; b < wide; ++b) total -= part[b * d + c];
    check("gated linear residual part", total, 0, 10 * tolerance);
  }
}

template <class P>
void test_linear() {
  using vlmk::Activation;
  constexpr int64_t n = 9, o = 70, k = 1040, width = vlmk::kBlockCols<P>, blocks = vlmk::ceil_div(o, width);
  const double tolerance = sizeof(P) == 8 ? 1e-11 : 2e-4;
  std::vector<P> x(n * k), w(o * k), bias(o), residual(n * o), y(n * o), out(n * o);
  std::vector<P> tiles(vlmk::kBlockRows<P> * 1088), turned(o * 64);
  for (int64_t i = 0; i < n * k; ++i) x[i] = std::sin(P(0.37) * i);
  for (int64_t i = 0; i < o * k; ++i) w[i] = std::cos(P(0.23) * i) / 8;
  for (int64_t i = 0; i < n * o; ++i) residual[i] = std::sin(P(0.7) * i);
  for (int64_t c = 0; c < o; ++c) bias[c] = P(0.01) * c;
  const auto below = [](double v) { return 0.5 * std::erfc(-v / std::sqrt(2.0)); };
  const auto slope = [&](double v) { return below(v) + v * std::exp(-0.5 * v * v) / std::sqrt(2 * std::acos(-1.0)); };
  const vlmk::LinearOutput<P> f{o, Activation::gelu, bias.data(), stored(y), stored(residual), stored(out)};
  const auto check_out = [&](const char* what, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < o; ++c) {
        double sum = bias[c];
        for (int64_t e = 0; e < k; ++e) sum += double(x[r * k + e]) * w[c * k + e];
        check(what, y[r * o + c], sum, tolerance);
        check(what, out[r * o + c], sum * below(sum) + residual[r * o + c], tolerance);
      }
    }
    std::fill(out.begin(), out.end(), P(0));
  };

  const std::vector<P> wt = transposed(w, o, k);
  vlmk::BlockProduct<P> p{plain_product<P>, x.data(),     wt.data(), n, k, width, k, vlmk::kBlockDepth, width, 0,
                          blocks,           tiles.data(), nullptr};
  VLMK_CALL(linear, p, f, int64_t(0), n);
  check_out("linear", n);

  std::vector<P> xt(k * 16);
  VLMK_CALL(pack_transposed_b, x.data(), k, n, k, k, int64_t(16), xt.data());
  p = {plain_product<P>, w.data(), xt.data(), o, k, 16, k, vlmk::kBlockDepth, 16, 0, 1, tiles.data(), nullptr};
  VLMK_CALL(linear_few, p, f, int64_t(0), o, n, turned.data());
  check_out("linear, few rows", n);
  VLMK_CALL(linear_row, f, x.data(), w.data(), k, int64_t(0), o);
  check_out("linear, one row", 1);

  // dx through an activation: x is the layer before it.
  const int64_t wide = vlmk::ceil_div(k, width);
  std::vector<P> packed(wide * o * width), dx(n * k), hidden(n * k);
  for (int64_t k0 = 0; k0 < k; k0 += width) {
    VLMK_CALL(pack_columns_b, w.data() + k0, k, static_cast<const P*>(nullptr), std::min(width, k - k0), o, o,
              packed.data() + k0 * o);
  }
  const vlmk::LinearInput<P> to_x{k, stored(dx), {}, Activation::gelu, stored(x), stored(hidden)};
  p = {plain_product<P>, residual.data(), packed.data(), n, o, width, o, vlmk::kBlockDepth, width, 0, wide,
       tiles.data(),     nullptr};
  VLMK_CALL(linear_dx, p, to_x, int64_t(0), n);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t e = 0; e < k; ++e) {
      double want = 0;
      for (int64_t c = 0; c < o; ++c) want += double(residual[r * o + c]) * w[c * k + e];
      const double at = x[r * k + e];
      check("linear dx", dx[r * k + e], want * slope(at), tolerance);
      check("linear hidden", hidden[r * k + e], at * below(at), tolerance);
    }
  }

  // Rows in two calls, the second of which finishes.
  std::vector<P> sums(o * k), dw(o * k);
  const vlmk::LinearWeight<P> to_w{k, sums.data(), stored(dw)};
  for (int64_t first : {int64_t(0), n / 2}) {
    const int64_t rows = first ? n - first : n / 2;
    std::vector<P> a(o * rows), b(wide * rows * width);
    VLMK_CALL(pack_transposed_a, residual.data() + first * o, o, rows, o, rows, a.data());
    for (int64_t k0 = 0; k0 < k; k0 += width) {
      VLMK_CALL(pack_columns_b, x.data() + first * k + k0, k, static_cast<const P*>(nullptr), std::min(width, k - k0), rows,
                rows, b.data() + k0 * rows);
    }
    p = {plain_product<P>, a.data(), b.data(), o, rows, width, rows, rows * o, width, 0, wide, tiles.data(), nullptr};
    VLMK_CALL(linear_dw, p, to_w, int64_t(0), o, first > 0, first > 0);
  }
  for (int64_t c = 0; c < o; ++c) {
    for (int64_t e = 0; e < k; ++e) {
      double want = 0;
      for (int64_t r = 0; r < n; ++r) want += double(residual[r * o + c]) * x[r * k + e];
      check("linear dw", dw[c * k + e], want, tolerance);
    }
  }
}

}  // namespace

void test_dense_layers() {
  test_gated_linear_residual<float>();
  test_gated_linear_residual<double>();
  test_linear<float>();
  test_linear<double>();
}
