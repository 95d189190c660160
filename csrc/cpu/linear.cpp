#include "vlmkernels/linear.h"

#include <type_traits>

#include "activations.h"
#include "block_product.h"

namespace vlmk::VLMK_ISA {
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

// Some columns of some rows of a matrix whose rows are `width` long.
struct Window {
  int64_t width, row, count, c0, cols;
  int64_t at(int64_t r) const { return (row + r) * width + c0; }
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

// The tile of products as rows of the result; the tile is left with anything. The passes over it stay in the cache.
template <class P>
void finish(const LinearOutput<P>& f, acc_t<P>* tile, int64_t ld, const Window& w, bool biased) {
  using A = acc_t<P>;
  if (f.bias && biased) {
    const A* bias = f.bias + w.c0;
    for (int64_t r = 0; r < w.count; ++r) {
#pragma omp simd
      for (int64_t c = 0; c < w.cols; ++c) tile[r * ld + c] += bias[c];
    }
  }
  if (f.y.data) copy_out(tile, ld, w, f.y);
  if (f.activation != Activation::none) {
    with_activation(f.activation, [&](auto act) {
      for (int64_t r = 0; r < w.count; ++r) {
#pragma omp simd
        for (int64_t c = 0; c < w.cols; ++c) tile[r * ld + c] = act.value(tile[r * ld + c]);
      }
    });
  }
  if (f.residual.data) {
    with_type(f.residual, [&](auto* x) {
      for (int64_t r = 0; r < w.count; ++r) {
        const auto* row = x + w.at(r);
#pragma omp simd
        for (int64_t c = 0; c < w.cols; ++c) {
          A residual;
          get(row[c], residual);
          tile[r * ld + c] += residual;
        }
      }
    });
  }
  copy_out(tile, ld, w, f.out);
}

}  // namespace

template <class P>
void linear(const BlockProduct<P>& p, const LinearOutput<P>& f, int64_t row, int64_t count) {
  for_tiles(p, [&](int64_t j, acc_t<P>* tile) {
    finish(f, tile, p.cols, Window{f.o, row, count, j * p.cols, min_(p.cols, f.o - j * p.cols)}, true);
  });
}

template <class P>
void linear_few(const BlockProduct<P>& p, const LinearOutput<P>& f, int64_t o0, int64_t count, int64_t rows, acc_t<P>* turned) {
  for_tiles(p, [&](int64_t j, const acc_t<P>* tile) {
    const int64_t row = j * p.cols, of = min_(p.cols, rows - row);
    transpose(tile, p.cols, count, of, turned, count);
    finish(f, turned, count, Window{f.o, row, of, o0, count}, true);
  });
}

template <class P>
void linear_row(const LinearOutput<P>& f, const P* x, const P* w, int64_t depth, int64_t o0, int64_t count) {
  using A = acc_t<P>;
  constexpr int64_t kSome = 64;
  for (int64_t o = 0; o < count; o += kSome) {
    const int64_t some = min_(kSome, count - o);
    A sums[kSome];
    dot_rows(x, w + o * depth, depth, some, sums);
    finish(f, sums, kSome, Window{f.o, 0, 1, o0 + o, some}, true);
  }
}

template <class P>
void linear_finish(const LinearOutput<P>& f, Stored y, int64_t row, int64_t count) {
  constexpr int64_t kCols = 2048;
  acc_t<P> tile[kCols];
  for (int64_t r = row; r < row + count; ++r) {
    for (int64_t c = 0; c < f.o; c += kCols) {
      const Window w{f.o, r, 1, c, min_(kCols, f.o - c)};
      copy_in(y, w, tile, kCols);
      finish(f, tile, kCols, w, false);
    }
  }
}

template <class P>
void linear_dx(const BlockProduct<P>& p, const LinearInput<P>& f, int64_t row, int64_t count) {
  using A = acc_t<P>;
  for_tiles(p, [&](int64_t j, A* tile) {
    const Window w{f.k, row, count, j * p.cols, min_(p.cols, f.k - j * p.cols)};
    if (!f.y.data) return copy_out(tile, p.cols, w, f.dx);
    with_activation(f.activation, [&](auto act) {
      with_type(f.y, [&](auto* y) {
        with_type(f.dx, [&](auto* dx) {
          for (int64_t r = 0; r < w.count; ++r) {
            const auto* from = y + w.at(r);
            auto* to = dx + w.at(r);
#pragma omp simd
            for (int64_t c = 0; c < w.cols; ++c) {
              A v;
              get(from[c], v);
              put(tile[r * p.cols + c] * act.slope(v), to[c]);
            }
          }
        });
        if (!f.hidden.data) return;
        with_type(f.hidden, [&](auto* hidden) {
          for (int64_t r = 0; r < w.count; ++r) {
            const auto* from = y + w.at(r);
            auto* to = hidden + w.at(r);
#pragma omp simd
            for (int64_t c = 0; c < w.cols; ++c) {
              A v;
              get(from[c], v);
              put(act.value(v), to[c]);
            }
          }
        });
      });
    });
  });
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
void linear_slope(int64_t o, Activation activation, Stored dout, Stored y, Stored g, A* sum, int64_t row, int64_t count) {
  constexpr int64_t kCols = 512;
  A from[kCols], at[kCols];
  for (int64_t c = 0; c < (sum ? o : 0); ++c) sum[c] = 0;
  for (int64_t r = row; r < row + count; ++r) {
    for (int64_t c0 = 0; c0 < o; c0 += kCols) {
      const Window w{o, r, 1, c0, min_(kCols, o - c0)};
      copy_in(dout, w, from, kCols);
      if (activation != Activation::none) {
        copy_in(y, w, at, kCols);
        with_activation(activation, [&](auto act) {
#pragma omp simd
          for (int64_t c = 0; c < w.cols; ++c) from[c] *= act.slope(at[c]);
        });
      }
      if (g.data) copy_out(from, kCols, w, g);
      if (!sum) continue;
      A* total = sum + c0;
#pragma omp simd
      for (int64_t c = 0; c < w.cols; ++c) total[c] += from[c];
    }
  }
}

#define VLMK_INSTANTIATE(P)                                                                                       \
  template void linear(const BlockProduct<P>&, const LinearOutput<P>&, int64_t, int64_t);                         \
  template void linear_few(const BlockProduct<P>&, const LinearOutput<P>&, int64_t, int64_t, int64_t, acc_t<P>*); \
  template void linear_row(const LinearOutput<P>&, const P*, const P*, int64_t, int64_t, int64_t);                \
  template void linear_finish(const LinearOutput<P>&, Stored, int64_t, int64_t);                                  \
  template void linear_dx(const BlockProduct<P>&, const LinearInput<P>&, int64_t, int64_t);                       \
  template void linear_dw(const BlockProduct<P>&, const LinearWeight<P>&, int64_t, int64_t, bool, bool);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)
template void linear_slope(int64_t, Activation, Stored, Stored, Stored, float*, int64_t, int64_t);
template void linear_slope(int64_t, Activation, Stored, Stored, Stored, double*, int64_t, int64_t);

}  // namespace vlmk::VLMK_ISA
