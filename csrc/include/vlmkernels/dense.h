#pragma once
#include "vlmkernels/pack.h"

namespace vlmk {

// A product runs over blocks of kBlockRows rows and kBlockCols columns, as measured best, in parts of kBlockDepth of its
// depth: one long chain of additions would round more than mm does, and a part of a block of rows stays in the cache.
constexpr int64_t kBlockDepth = 256;
template <class P>
constexpr int64_t kBlockRows = sizeof(P) == 2 ? 256 : 512;
template <class P>
constexpr int64_t kBlockCols = sizeof(P) == 2 ? 256 : 64;
// From row to row of a part that is copied out: rows that are whole pages apart share cache lines.
constexpr int64_t kPartStride = kBlockDepth + kUnit;

// Rows of A against several column blocks of B. A B operand is [blocks][depth][cols], bf16 [blocks][depth / 2][cols][2]; or,
// when ldb is not cols, columns of one matrix [depth][ldb].
template <class P>
struct BlockProduct {
  TileProduct<P> product;
  const P* a;  // [rows, depth]; its parts are a_step apart and their rows lda
  const P* b;
  int64_t rows, depth, cols, lda, a_step, ldb;
  int64_t first, last;  // column blocks
  acc_t<P>* tiles;      // [last - first][rows][cols]
  P* part;              // [rows][kPartStride], bf16 only
};

enum class Activation { none, gelu, gelu_tanh, quick_gelu, silu, relu, squared_relu };
enum class Storage { f32, f64, bf16, f16 };

// A matrix of any storage; null where there is none.
struct Stored {
  void* data = nullptr;
  Storage type = Storage::f32;
};

// out = act(y) + residual, y = x weight^T + bias; with a gate out = act(gate) * y + residual; with t out = residual + t y, the
// residual in the type of out.
template <class P>
struct LinearOutput {
  int64_t o;
  Activation activation = Activation::none;
  const acc_t<P>* bias = nullptr;  // [o] or null
  Stored y{};                      // [rows, o] where y is kept, or null
  Stored residual{};               // [rows, o] or null
  Stored out{};                    // [rows, o]
  Stored gate{};                   // [rows, o] or null
  const acc_t<P>* t = nullptr;     // [o] or null
  const int64_t* index = nullptr;  // which rows of these matrices the rows of the product are; null when they are all
};

// dx = g weight + plus. Where the weight multiplied hidden = act(y), dx = g weight * act'(y); where it multiplied
// hidden = act(y) * up, dx = g weight * up * act'(y) and dup = g weight * act(y).
template <class P>
struct LinearInput {
  int64_t k;
  Stored dx{};    // [rows, k]
  Stored plus{};  // [rows, k] or null, not where there is a y
  Activation activation = Activation::none;
  Stored y{};       // [rows, k] or null
  Stored hidden{};  // [rows, k] or null
  Stored up{};      // [rows, k] or null
  Stored dup{};     // [rows, k]
};

// dweight = g^T x.
template <class P>
struct LinearWeight {
  int64_t k;
  acc_t<P>* sums;  // [o, k] sums over earlier rows, if the rows take more than one task
  Stored dweight;  // [o, k]
};

VLMK_PER_ISA(
    // out[i] = row index[i] (i when null) of x as P, with zeros up to depth and in rows beyond count.
    template <class S, class P>
    void load_rows(const S* x, const int64_t* index, int64_t count, int64_t d, int64_t rows, int64_t depth, P* out);
    // Columns [0, count) of w [d, ldw], row i times t[i] (1 when null), as one block of a B operand, zero padded.
    template <class P>
    void pack_columns_b(const P* w, int64_t ldw, const acc_t<P>* t, int64_t count, int64_t d, int64_t depth, P* out);
    // B is weight^T: columns are channels. The product's rows are rows [row, row + count).
    template <class P> void linear(const BlockProduct<P>& p, const LinearOutput<P>& f, int64_t row, int64_t count);
    // For few rows: A is [count] rows of the weight from channel o0 on, B is x^T of `rows` rows.
    template <class P> void linear_few(const BlockProduct<P>& p, const LinearOutput<P>& f, int64_t o0, int64_t count,
                                       int64_t rows, acc_t<P>* turned);  // [cols][count]
    // For a single row x [depth], without tile products: w [count, depth] are rows of the weight from channel o0 on.
    template <class P>
    void linear_row(const LinearOutput<P>& f, const P* x, const P* w, int64_t depth, int64_t o0, int64_t count);
    // The epilogue of a product x weight^T [rows, o] in memory, for rows [row, row + count).
    template <class P> void linear_finish(const LinearOutput<P>& f, Stored product, int64_t row, int64_t count);
    // B is the weight. The product's rows are rows [row, row + count).
    template <class P> void linear_dx(const BlockProduct<P>& p, const LinearInput<P>& f, int64_t row, int64_t count);
    // The epilogue of a product g weight [rows, k] in memory, for rows [row, row + count).
    template <class P> void linear_dx_finish(const LinearInput<P>& f, Stored product, int64_t row, int64_t count);
    // A is g^T of `count` channels from o0 on, B is x, both of some rows: their product is added to the sums over earlier
    // rows if `add`, and written to dweight if `finish`.
    template <class P>
    void linear_dw(const BlockProduct<P>& p, const LinearWeight<P>& f, int64_t o0, int64_t count, bool add, bool finish);
    // Rows [row, row + count) of g = dout * act'(y) [rows, o] where g is not null, and the sums of its columns, [o], where
    // `sum` is not null.
    template <class A> void linear_slope(int64_t o, Activation activation, Stored dout, Stored y, Stored g, double* sum,
                                         int64_t row, int64_t count);)

}  // namespace vlmk
