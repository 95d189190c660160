#include "dense.h"

#include <type_traits>

#include "dense_activations.h"

namespace vlmk::VLMK_ISA {

template <class S, class P>
void load_rows(const S* x, const int64_t* index, int64_t count, int64_t d, int64_t rows, int64_t depth, P* out) {
  for (int64_t i = 0; i < rows; ++i, out += depth) {
    const int64_t loaded = i < count ? d : 0;
    const S* row = i < count ? x + (index ? index[i] : i) * d : x;
    if constexpr (std::is_same_v<S, P>) {
      for (int64_t c = 0; c < loaded; ++c) out[c] = row[c];
    } else {
#pragma omp simd
      for (int64_t c = 0; c < loaded; ++c) from_acc(static_cast<acc_t<P>>(to_acc(row[c])), out[c]);
    }
    for (int64_t c = loaded; c < depth; ++c) out[c] = P{};
  }
}

template <class P>
void pack_columns_b(const P* w, int64_t ldw, const acc_t<P>* t, int64_t count, int64_t d, int64_t depth, P* out) {
  constexpr int64_t cols = kBlockCols<P>;
  if constexpr (kPaired<P>) {
    for (int64_t i = 0; i < depth; i += 2, out += 2 * cols) {
      auto* pairs = reinterpret_cast<Pair*>(out);
      const P *first = w + i * ldw, *second = first + ldw;
      const acc_t<P> t0 = t && i < d ? t[i] : 1, t1 = t && i + 1 < d ? t[i + 1] : 1;
      if (i + 1 < d && t) {
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) put_pair(t0 * to_acc(first[c]), t1 * to_acc(second[c]), pairs[c]);
      } else if (i + 1 < d) {
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) {
          pairs[c].bits = static_cast<uint32_t>(first[c].bits) | static_cast<uint32_t>(second[c].bits) << 16;
        }
      } else if (i < d) {
        for (int64_t c = 0; c < count; ++c) put_pair(t0 * to_acc(first[c]), 0.0f, pairs[c]);
      }
      for (int64_t c = i < d ? count : 0; c < cols; ++c) pairs[c] = {};
    }
  } else {
    for (int64_t i = 0; i < depth; ++i, w += ldw, out += cols) {
      const P scale = t && i < d ? t[i] : P(1);
      const int64_t loaded = i < d ? count : 0;
#pragma omp simd
      for (int64_t c = 0; c < loaded; ++c) out[c] = scale * w[c];
      for (int64_t c = loaded; c < cols; ++c) out[c] = P{};
    }
  }
}

#define VLMK_LOAD(P)                                                                              \
  template void load_rows(const float*, const int64_t*, int64_t, int64_t, int64_t, int64_t, P*);  \
  template void load_rows(const double*, const int64_t*, int64_t, int64_t, int64_t, int64_t, P*); \
  template void load_rows(const bf16*, const int64_t*, int64_t, int64_t, int64_t, int64_t, P*);   \
  template void load_rows(const f16*, const int64_t*, int64_t, int64_t, int64_t, int64_t, P*);    \
  template void pack_columns_b(const P*, int64_t, const acc_t<P>*, int64_t, int64_t, int64_t, P*);
VLMK_LOAD(float)
VLMK_LOAD(double)
VLMK_LOAD(bf16)
namespace {

// Between the types of sums and of matrices; float64 sums meet float64 matrices only, and the other way round.
template <class T, class A>
VLMK_INLINE void get(T x, A& out) {
  out = static_cast<A>(to_acc(x));
}
template <class A, class T>
VLMK_INLINE void put(A x, T& out) {
  from_acc(static_cast<acc_t<T>>(x), out);
}

// Some columns of some rows of a matrix whose rows are `width` long: rows index[row ..], or row .. when index is null.
struct Window {
  int64_t width, row, count, c0, cols;
  const int64_t* index = nullptr;
  int64_t at(int64_t r) const { return (index ? index[row + r] : row + r) * width + c0; }
};

template <class A>
void copy_in(const Stored& from, const Window& w, A* tile, int64_t ld) {
  with_type(from, [&](auto* x) {
    for (int64_t r = 0; r < w.count; ++r) {
      const auto* row = x + w.at(r);
#pragma omp simd
      for (int64_t c = 0; c < w.cols; ++c) get(row[c], tile[r * ld + c]);
    }
  });
}
template <class A>
void copy_out(const A* tile, int64_t ld, const Window& w, const Stored& to) {
  with_type(to, [&](auto* x) {
    for (int64_t r = 0; r < w.count; ++r) {
      auto* row = x + w.at(r);
#pragma omp simd
      for (int64_t c = 0; c < w.cols; ++c) put(tile[r * ld + c], row[c]);
    }
  });
}

// tile += x
template <class A>
void add(const Stored& from, const Window& w, A* tile, int64_t ld) {
  with_type(from, [&](auto* x) {
    for (int64_t r = 0; r < w.count; ++r) {
      const auto* row = x + w.at(r);
#pragma omp simd
      for (int64_t c = 0; c < w.cols; ++c) {
        A value;
        get(row[c], value);
        tile[r * ld + c] += value;
      }
    }
  });
}

// Some rows of matrices, widened, while they are worked on.
constexpr int64_t kStageRows = 8, kStageCols = 256;
template <class A>
using Stage = A[kStageRows * kStageCols];

// Calls f(window, offset into the tile) for parts of a window that fit a stage, whose rows are kStageCols long.
template <class F>
void for_stages(const Window& w, int64_t ld, F f) {
  for (int64_t r = 0; r < w.count; r += kStageRows) {
    for (int64_t c = 0; c < w.cols; c += kStageCols) {
      f(Window{w.width, w.row + r, min_(kStageRows, w.count - r), w.c0 + c, min_(kStageCols, w.cols - c), w.index}, r * ld + c);
    }
  }
}

template <class P>
void multiply_by_gate(const LinearOutput<P>& f, acc_t<P>* tile, int64_t ld, const Window& all) {
  with_activation(f.activation, [&](auto act) {
    for_stages(all, ld, [&](const Window& w, int64_t at) {
      Stage<acc_t<P>> gate;
      copy_in(f.gate, w, gate, kStageCols);
      for (int64_t r = 0; r < w.count; ++r) {
#pragma omp simd
        for (int64_t c = 0; c < w.cols; ++c) tile[at + r * ld + c] *= act.value(gate[r * kStageCols + c]);
      }
    });
  });
}

// The gradients by the inputs of the activation, and of what it multiplied; tile = g weight is that by hidden.
template <class P>
void slopes(const LinearInput<P>& f, const acc_t<P>* tile, int64_t ld, const Window& all) {
  with_activation(f.activation, [&](auto act) {
    for_stages(all, ld, [&](const Window& w, int64_t at) {
      Stage<acc_t<P>> y, up, dy, dup;
      copy_in(f.y, w, y, kStageCols);
      if (f.up.data) copy_in(f.up, w, up, kStageCols);
      for (int64_t r = 0; r < w.count; ++r) {
        const acc_t<P>* grad = tile + at + r * ld;
        const int64_t row = r * kStageCols;
        if (f.up.data) {
#pragma omp simd
          for (int64_t c = row; c < row + w.cols; ++c) {
            const acc_t<P> value = act.value(y[c]);
            dy[c] = grad[c - row] * up[c] * act.slope(y[c]);
            dup[c] = grad[c - row] * value;
            y[c] = value * up[c];
          }
        } else {
#pragma omp simd
          for (int64_t c = row; c < row + w.cols; ++c) {
            dy[c] = grad[c - row] * act.slope(y[c]);
            y[c] = act.value(y[c]);
          }
        }
      }
      copy_out(dy, kStageCols, w, f.dx);
      if (f.up.data) copy_out(dup, kStageCols, w, f.dup);
      if (f.hidden.data) copy_out(y, kStageCols, w, f.hidden);
    });
  });
}

template <class P>
void finish_dx(const LinearInput<P>& f, acc_t<P>* tile, int64_t ld, const Window& w) {
  if (f.y.data) return slopes<P>(f, tile, ld, w);
  if (f.plus.data) add(f.plus, w, tile, ld);
  copy_out(tile, ld, w, f.dx);
}

// out = residual + t tile, in one pass.
template <class P>
void add_to_residual(const LinearOutput<P>& f, const acc_t<P>* tile, int64_t ld, const Window& w) {
  const acc_t<P>* t = f.t + w.c0;
  with_type(f.out, [&](auto* out) {
    const auto* residual = static_cast<decltype(out)>(f.residual.data);
    for (int64_t r = 0; r < w.count; ++r) {
      const auto* x = residual + w.at(r);
      auto* row = out + w.at(r);
#pragma omp simd
      for (int64_t c = 0; c < w.cols; ++c) {
        acc_t<P> value;
        get(x[c], value);
        put(value + t[c] * tile[r * ld + c], row[c]);
      }
    }
  });
}

// The tile of products as rows of the result; the tile is left with anything. The passes over it stay in the cache.
template <class P>
void finish(const LinearOutput<P>& f, acc_t<P>* tile, int64_t ld, const Window& w) {
  using A = acc_t<P>;
  if (f.bias) {
    const A* bias = f.bias + w.c0;
    for (int64_t r = 0; r < w.count; ++r) {
#pragma omp simd
      for (int64_t c = 0; c < w.cols; ++c) tile[r * ld + c] += bias[c];
    }
  }
  if (f.y.data) copy_out(tile, ld, w, f.y);
  if (f.gate.data) {
    multiply_by_gate(f, tile, ld, w);
  } else if (f.activation != Activation::none) {
    with_activation(f.activation, [&](auto act) {
      for (int64_t r = 0; r < w.count; ++r) {
#pragma omp simd
        for (int64_t c = 0; c < w.cols; ++c) tile[r * ld + c] = act.value(tile[r * ld + c]);
      }
    });
  }
  if (f.t) return add_to_residual(f, tile, ld, w);
  if (f.residual.data) add(f.residual, w, tile, ld);
  copy_out(tile, ld, w, f.out);
}

// Calls f(tile, ld, window) with parts of rows of a product [rows, width] that is in memory.
template <class A, class F>
void for_products(const Stored& product, int64_t width, int64_t row, int64_t count, F f) {
  constexpr int64_t kCols = 2048;
  A tile[kCols];
  for (int64_t r = row; r < row + count; ++r) {
    for (int64_t c = 0; c < width; c += kCols) {
      const Window w{width, r, 1, c, min_(kCols, width - c)};
      copy_in(product, w, tile, kCols);
      f(tile, kCols, w);
    }
  }
}

}  // namespace

template <class P>
void linear(const BlockProduct<P>& p, const LinearOutput<P>& f, int64_t row, int64_t count) {
  for_tiles(p, [&](int64_t j, acc_t<P>* tile) {
    finish(f, tile, p.cols, Window{f.o, row, count, j * p.cols, min_(p.cols, f.o - j * p.cols), f.index});
  });
}

template <class P>
void linear_few(const BlockProduct<P>& p, const LinearOutput<P>& f, int64_t o0, int64_t count, int64_t rows, acc_t<P>* turned) {
  for_tiles(p, [&](int64_t j, const acc_t<P>* tile) {
    const int64_t row = j * p.cols, of = min_(p.cols, rows - row);
    transpose(tile, p.cols, count, of, turned, count);
    finish(f, turned, count, Window{f.o, row, of, o0, count, f.index});
  });
}

template <class P>
void linear_row(const LinearOutput<P>& f, const P* x, const P* w, int64_t depth, int64_t o0, int64_t count) {
  using A = acc_t<P>;
  constexpr int64_t kSome = 256;
  for (int64_t o = 0; o < count; o += kSome) {
    const int64_t some = min_(kSome, count - o);
    A sums[kSome];
    dot_rows(x, w + o * depth, depth, some, sums);
    finish(f, sums, kSome, Window{f.o, 0, 1, o0 + o, some, f.index});
  }
}

template <class P>
void linear_finish(const LinearOutput<P>& f, Stored product, int64_t row, int64_t count) {
  for_products<acc_t<P>>(product, f.o, row, count, [&](auto* tile, int64_t ld, const Window& w) { finish(f, tile, ld, w); });
}

template <class P>
void linear_dx(const BlockProduct<P>& p, const LinearInput<P>& f, int64_t row, int64_t count) {
  using A = acc_t<P>;
  for_tiles(p, [&](int64_t j, A* tile) {
    const Window w{f.k, row, count, j * p.cols, min_(p.cols, f.k - j * p.cols)};
    finish_dx(f, tile, p.cols, w);
  });
}

template <class P>
void linear_dx_finish(const LinearInput<P>& f, Stored product, int64_t row, int64_t count) {
  for_products<acc_t<P>>(product, f.k, row, count, [&](auto* tile, int64_t ld, const Window& w) { finish_dx(f, tile, ld, w); });
}

template <class P>
void linear_dw(const BlockProduct<P>& p, const LinearWeight<P>& f, int64_t o0, int64_t count, bool add, bool finish) {
  using A = acc_t<P>;
  for_tiles(p, [&](int64_t j, A* tile) {
    const Window w{f.k, o0, count, j * p.cols, min_(p.cols, f.k - j * p.cols)};
    for (int64_t r = 0; r < (add ? count : 0); ++r) {
      const A* sums = f.sums + w.at(r);
#pragma omp simd
      for (int64_t c = 0; c < w.cols; ++c) tile[r * p.cols + c] += sums[c];
    }
    if (finish) return copy_out(tile, p.cols, w, f.dweight);
    for (int64_t r = 0; r < count; ++r) __builtin_memcpy(f.sums + w.at(r), tile + r * p.cols, w.cols * sizeof(A));
  });
}

template <class A>
void linear_slope(int64_t o, Activation activation, Stored dout, Stored y, Stored g, double* sum, int64_t row, int64_t count) {
  constexpr int64_t kCols = 512, kSums = 8 * kCols;
  A from[kCols], at[kCols], some[kSums];
  for (int64_t c = 0; c < (sum ? o : 0); ++c) sum[c] = 0;
  for (int64_t r0 = row; r0 < row + count; r0 += kSumRows) {
    for (int64_t s0 = 0; s0 < o; s0 += kSums) {
      const int64_t s1 = min_(s0 + kSums, o);
      for (int64_t c = 0; c < (sum ? s1 - s0 : 0); ++c) some[c] = 0;
      for (int64_t r = r0; r < min_(r0 + kSumRows, row + count); ++r) {
        for (int64_t c0 = s0; c0 < s1; c0 += kCols) {
          const Window w{o, r, 1, c0, min_(kCols, s1 - c0)};
          copy_in(dout, w, from, kCols);
          if (activation != Activation::none) {
            copy_in(y, w, at, kCols);
            with_activation(activation, [&](auto act) {
#pragma omp simd
              for (int64_t c = 0; c < w.cols; ++c) from[c] *= act.slope(at[c]);
            });
          }
          if (g.data) copy_out(from, kCols, w, g);
          A* total = some + c0 - s0;
#pragma omp simd
          for (int64_t c = 0; c < (sum ? w.cols : 0); ++c) total[c] += from[c];
        }
      }
#pragma omp simd
      for (int64_t c = 0; c < (sum ? s1 - s0 : 0); ++c) sum[s0 + c] += some[c];
    }
  }
}

#define VLMK_INSTANTIATE(P)                                                                                       \
  template void linear(const BlockProduct<P>&, const LinearOutput<P>&, int64_t, int64_t);                         \
  template void linear_few(const BlockProduct<P>&, const LinearOutput<P>&, int64_t, int64_t, int64_t, acc_t<P>*); \
  template void linear_row(const LinearOutput<P>&, const P*, const P*, int64_t, int64_t, int64_t);                \
  template void linear_finish(const LinearOutput<P>&, Stored, int64_t, int64_t);                                  \
  template void linear_dx(const BlockProduct<P>&, const LinearInput<P>&, int64_t, int64_t);                       \
  template void linear_dx_finish(const LinearInput<P>&, Stored, int64_t, int64_t);                                \
  template void linear_dw(const BlockProduct<P>&, const LinearWeight<P>&, int64_t, int64_t, bool, bool);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)
template void linear_slope<float>(int64_t, Activation, Stored, Stored, Stored, double*, int64_t, int64_t);
template void linear_slope<double>(int64_t, Activation, Stored, Stored, Stored, double*, int64_t, int64_t);

}  // namespace vlmk::VLMK_ISA
