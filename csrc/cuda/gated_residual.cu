#include <algorithm>
#include <type_traits>

#include "gated_residual.cuh"

namespace vlmk::cuda {
namespace {

constexpr int64_t kSteps = 4;       // rows of a thread, that tanh of its gates is not most of its work
constexpr int64_t kPartials = 512;  // blocks that sum for the gate, about: as many as a large GPU runs at once
constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t size_of(DType type) {
  return with_type(type, [](auto value) { return int64_t(sizeof(value)); });
}

// Channels of one access: 16 bytes of the wider type where both operands and the result are aligned to it, otherwise 1.
int64_t vector_of(Matrix wide, Matrix narrow, const void* result, DType result_type, int64_t d) {
  const int64_t v = 16 / size_of(wide.type);
  const auto fits = [&](Matrix m) {
    return reinterpret_cast<uintptr_t>(m.data) % (v * size_of(m.type)) == 0 && m.stride % v == 0;
  };
  return d % v == 0 && fits(wide) && fits(narrow) && fits({result, result_type, d}) ? v : 1;
}

Tiling tiling_of(int64_t d, int64_t vector) {
  const int64_t groups = ceil_div(d, vector), lanes = std::min<int64_t>(groups, kWarp);
  return {int(lanes), int(kThreads / lanes), int(ceil_div(groups, lanes))};
}

// Blocks that share the rows, at most about `most` blocks in all.
int64_t row_blocks(Tiling tiling, int64_t rows, int64_t most) {
  return std::clamp<int64_t>(most / tiling.col_blocks, 1, ceil_div(rows, tiling.rows * kSteps));
}

template <class T>
Rows<T> rows_of(Matrix m) {
  return {static_cast<const T*>(m.data), m.stride};
}

// f of the types of the operands and the channels of one access; what the launches failed with, or null.
template <class F>
const char* with_access(Matrix wide, Matrix narrow, int64_t vector, Stream stream, F f) {
  if (!gated_residual_takes(wide.type, narrow.type)) return "no kernel for these types";
  use(stream);
  with_type(narrow.type, [&](auto y) {
    const auto with_x = [&](auto x) {
      if (vector == 1) return f(x, y, std::integral_constant<int, 1>());
      f(x, y, std::integral_constant<int, 16 / sizeof(x)>());
    };
    if (wide.type == narrow.type) return with_x(y);
    if constexpr (sizeof(y) == 2) with_x(float());
  });
  return failure();
}

}  // namespace

bool gated_residual_takes(DType x, DType y) { return x == y || (x == DType::f32 && size_of(y) == 2); }

const char* gated_residual(Matrix x, Matrix y, Gate gate, const bool* row_mask, void* out, int64_t rows, int64_t d,
                           Stream stream) {
  return with_access(x, y, vector_of(x, y, out, x.type, d), stream, [&](auto first, auto second, auto vector) {
    using X = decltype(first);
    using Y = decltype(second);
    constexpr int V = vector.value;
    const Tiling tiling = tiling_of(d, V);
    launch(stream, tiling.col_blocks * row_blocks(tiling, rows, kMostBlocks), kThreads, forward<V, X, Y>, rows_of<X>(x),
           rows_of<Y>(y), gate, row_mask, static_cast<X*>(out), rows, d, tiling);
  });
}

int64_t gated_residual_bwd_scratch(Matrix dout, Matrix y, Gate gate, const void* dy, int64_t rows, int64_t d) {
  const Tiling tiling = tiling_of(d, vector_of(dout, y, dy, y.type, d));
  return row_blocks(tiling, rows, kPartials) * (gate.per_channel ? d : tiling.col_blocks);
}

const char* gated_residual_bwd(Matrix dout, Matrix y, Gate gate, const bool* row_mask, void* dy, void* dgate, double* scratch,
                               int64_t rows, int64_t d, Stream stream) {
  return with_access(dout, y, vector_of(dout, y, dy, y.type, d), stream, [&](auto first, auto second, auto vector) {
    using G = decltype(first);
    using Y = decltype(second);
    constexpr int V = vector.value;
    const Tiling tiling = tiling_of(d, V);
    const int64_t parts = row_blocks(tiling, rows, dgate ? kPartials : kMostBlocks);
    launch(stream, tiling.col_blocks * parts, kThreads, backward<V, G, Y>, rows_of<G>(dout), rows_of<Y>(y), gate, row_mask,
           static_cast<Y*>(dy), dgate ? scratch : nullptr, rows, d, tiling);
    if (!dgate) return;
    const int64_t channels = gate.per_channel ? d : 1, lanes = std::min<int64_t>(channels, kWarp);
    with_type(gate.type, [&](auto value) {
      using T = decltype(value);
      launch(stream, ceil_div(channels, lanes), kThreads, finish<T>, static_cast<const double*>(scratch), gate,
             static_cast<T*>(dgate), gate.per_channel ? parts : parts * tiling.col_blocks, channels, int(lanes));
    });
  });
}

}  // namespace vlmk::cuda
