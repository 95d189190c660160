#pragma once
#include "vlmkernels/pack.h"

namespace vlmk {

// S = Q K^T is walked in tiles of kTileRows x kTileCols; tiles at the last row and column may be partly empty.
constexpr int64_t kTileRows = 128, kTileCols = 256, kTileSize = kTileRows * kTileCols;

// Products sum over this much of the depth at a time: one long chain of additions would round more than mm does.
constexpr int64_t kSumDepth = 512;

// The product with Q^T sums over this many tiles at once: bf16 units are fast enough to want a longer sum.
template <class P>
constexpr int64_t kKeyTiles = sizeof(P) == 2 ? 2 : 1;

// The operands of the tile products. `depth` is depth_of<P>(d).
template <class P>
struct Pairs {
  int64_t n, m, d, depth;
  const P* q;   // [n, depth]
  const P* kt;  // [col blocks][depth][kTileCols]; bf16: [col blocks][depth / 2][kTileCols][2]
  const P* k;   // [m, d]; bf16: [col blocks][kTileCols / 2][depth][2]; only where dq is formed
  const P* qt;  // [row blocks / kKeyTiles][d][kKeyTiles * kTileRows]; only where dk is formed, from row block qt_first on
  int64_t qt_first;
  acc_t<P> scale;
  const acc_t<P>* a;  // [n] inverse norms of the queries, or null
  const acc_t<P>* b;  // [m] inverse norms of the keys, or null
  TileProduct<P> product;

  int64_t row_blocks() const { return ceil_div(n, kTileRows); }
  int64_t col_blocks() const { return ceil_div(m, kTileCols); }
};

// Where finished gradients go: D = sum of the tiles' products (+ extra), dot_i = <x_i, D_i>,
// dx_i = scale inv_i (D_i - inv_i^2 dot_i x_i), the second term only when inv is given.
template <class P>
struct Finish {
  const P* x;  // [rows, ldx] the features themselves
  int64_t ldx;
  const acc_t<P>* extra;  // [rows, d] or null
  const acc_t<P>* inv;    // [rows] or null
  P* dx;                  // [rows, d]
  acc_t<P>* dot;          // [rows]
};

}  // namespace vlmk
