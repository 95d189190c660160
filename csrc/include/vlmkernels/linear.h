#pragma once
#include "vlmkernels/block_product.h"

namespace vlmk {

enum class Activation { none, gelu, gelu_tanh, quick_gelu, silu, relu, squared_relu };
enum class Storage { f32, f64, bf16, f16 };

// A matrix of any storage; null where there is none.
struct Stored {
  void* data = nullptr;
  Storage type = Storage::f32;
};

// out = act(y) + residual, y = x weight^T + bias; with a gate out = act(gate) * y + residual.
template <class P>
struct LinearOutput {
  int64_t o;
  Activation activation = Activation::none;
  const acc_t<P>* bias = nullptr;  // [o] or null
  Stored y{};                      // [rows, o] where y is kept, or null
  Stored residual{};               // [rows, o] or null
  Stored out{};                    // [rows, o]
  Stored gate{};                   // [rows, o] or null
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
  acc_t<P>* sums;  // [o, k], where sums of earlier rows are, if there are more than one task takes
  Stored dweight;  // [o, k]
};

VLMK_PER_ISA(
    // B is weight^T: columns are channels. The product's rows are rows [row, row + count).
    template <class P> void linear(const BlockProduct<P>& p, const LinearOutput<P>& f, int64_t row, int64_t count);
    // For few rows: A is [count] rows of the weight from channel o0 on, B is x^T of `rows` rows.
    template <class P> void linear_few(const BlockProduct<P>& p, const LinearOutput<P>& f, int64_t o0, int64_t count,
                                       int64_t rows, acc_t<P>* turned);  // [cols][count]
    // For a single row x [depth], without tile products: w [count, depth] are rows of the weight from channel o0 on.
    template <class P>
    void linear_row(const LinearOutput<P>& f, const P* x, const P* w, int64_t depth, int64_t o0, int64_t count);
    // What follows the product x weight^T [rows, o] that is in memory, for rows [row, row + count).
    template <class P> void linear_finish(const LinearOutput<P>& f, Stored product, int64_t row, int64_t count);
    // B is the weight. The product's rows are rows [row, row + count).
    template <class P> void linear_dx(const BlockProduct<P>& p, const LinearInput<P>& f, int64_t row, int64_t count);
    // What follows the product g weight [rows, k] that is in memory, for rows [row, row + count).
    template <class P> void linear_dx_finish(const LinearInput<P>& f, Stored product, int64_t row, int64_t count);
    // A is g^T of `count` channels from o0 on, B is x, both of some rows: their products are added to those of earlier rows
    // when `add`, and give dweight when `finish`.
    template <class P>
    void linear_dw(const BlockProduct<P>& p, const LinearWeight<P>& f, int64_t o0, int64_t count, bool add, bool finish);
    // Rows [row, row + count) of g = dout * act'(y) [rows, o] where g is not null, and the sums of its columns, [o], where
    // `sum` is not null.
    template <class A> void linear_slope(int64_t o, Activation activation, Stored dout, Stored y, Stored g, double* sum,
                                         int64_t row, int64_t count);)

}  // namespace vlmk
