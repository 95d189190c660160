// Gates of residuals: tanh gates, and the self-resurrecting activation unit.
#include <cmath>
#include <vector>

#include "check.h"
#include "vlmkernels/gated_residual.h"
#include "vlmkernels/srau.h"

namespace {

void test_gated_residual() {
  const int64_t rows = 5, d = 37;
  std::vector<float> x(rows * d), y(rows * d), t(d), out(rows * d), dy(rows * d);
  std::vector<double> part(d);
  const bool mask[rows] = {true, false, true, true, false};
  for (int64_t i = 0; i < rows * d; ++i) x[i] = std::sin(0.3f * i), y[i] = mask[i / d] ? std::cos(0.7f * i) : NAN;
  for (int64_t c = 0; c < d; ++c) t[c] = 0.01f * c;
  VLMK_CALL(gated_residual, x.data(), y.data(), t.data(), mask, out.data(), rows, d);
  VLMK_CALL(gated_residual_bwd, x.data(), y.data(), t.data(), mask, dy.data(), part.data(), rows, d);
  for (int64_t c = 0; c < d; ++c) {
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = r * d + c;
      check("gated residual", out[i], mask[r] ? double(x[i]) + double(t[c]) * y[i] : x[i], 1e-6);
      check("gated residual dy", dy[i], mask[r] ? double(t[c]) * x[i] : 0, 1e-6);
      if (mask[r]) sum += double(x[i]) * y[i];
    }
    check("gated residual part", part[c], sum, 1e-5);
  }
}

void test_srau(bool negated) {
  const int64_t rows = 5, d = 37, levels = 3, size = rows * d;
  std::vector<float> x(size), dout(size), visual(levels * size), logits(levels * size), out(size), dx(size);
  std::vector<float> dvisual(levels * size), dlogits(levels * size);
  const bool mask[rows] = {true, false, true, true, false};
  for (int64_t i = 0; i < size; ++i) x[i] = mask[i / d] ? std::sin(0.3f * i) : NAN, dout[i] = std::cos(0.2f * i);
  for (int64_t i = 0; i < levels * size; ++i) visual[i] = std::cos(0.7f * i), logits[i] = 4 * std::sin(0.5f * i);
  const double tau = 0.2, scale = 1 / std::sqrt(3.0), sign = negated ? -1 : 1;
  const vlmk::SrauInputs<float> in{x.data(), visual.data(), logits.data(), mask, rows, d, levels, size, tau, negated};
  VLMK_CALL(srau, in, out.data());
  VLMK_CALL(srau_bwd, dout.data(), in, dx.data(), dvisual.data(), dlogits.data());
  for (int64_t i = 0; i < size; ++i) {
    const bool kept = mask[i / d];
    double sum = 0, weight = 0;
    for (int64_t l = 0; l < levels; ++l) {
      const int64_t at = l * size + i;
      const double alpha = 1 / (1 + std::exp(-sign * logits[at])), spoken = alpha > tau, seen = alpha < 1 - tau;
      const double g = kept ? scale * dout[i] : 0, text = kept ? x[i] : 0;
      weight += alpha * spoken;
      sum += alpha * spoken * text + (1 - alpha) * seen * visual[at];
      check("srau dvisual", dvisual[at], g * (1 - alpha) * seen, 1e-6);
      check("srau dlogits", dlogits[at], sign * g * alpha * (1 - alpha) * (spoken * text - seen * visual[at]), 1e-6);
    }
    check("srau", out[i], kept ? scale * sum : 0, 1e-6);
    check("srau dlanguage", dx[i], kept ? scale * dout[i] * weight : 0, 1e-6);
  }
}

}  // namespace

void test_residual() {
  test_gated_residual();
  for (bool negated : {false, true}) test_srau(negated);
}
