#pragma once
#include "vlmkernels/pairwise.h"

namespace vlmk {

// s_ij = <q_i, k_j> a_i b_j. Tiles have keys j along their rows, which are operands of the product as they lie in memory, and
// queries i along their columns, so that the best so far of all queries of a tile are compared at once.
template <class P>
struct Similarities {
  int64_t n, d, depth;  // depth is depth_of<P>(d)
  int64_t width;        // queries in a block
  const P* queries;     // [blocks][depth][width]; bf16: [blocks][depth / 2][width][2]
  const acc_t<P>* a;    // [n], or null
  TileProduct<P> product;

  int64_t blocks() const { return ceil_div(n, width); }
};

// Queries are in blocks of up to kTileCols; this many of few are no product.
constexpr int64_t kFewSearches = 16;
// Keys that are worked on at a time then.
constexpr int64_t kFewKeys = 64;

template <class A>
struct Found {
  A value;
  int64_t index;
};

// The k best of each of `rows` rows so far, no NaN among them, and what came since: `room` of them, more than k.
template <class A>
struct Best {
  int64_t rows, k, room;
  Found<A>* found;  // [rows][room], in any order
  int64_t* held;    // [rows]
  A* least;         // [rows] the k-th best value; NaN, than which all are better, while nothing was left out
};

// Queries and keys match where their labels are equal.
struct Labels {
  const int64_t *query, *key;  // [n], [m]
};

// The best scores among the matches of some rows or columns; NaN if one is.
template <class A>
struct BestMatch {
  A* score;      // -inf where there is none
  uint8_t* any;  // whether there is one
};

VLMK_PER_ISA(
    // Rows of x [count, d] as operands [rows][depth], filled up with zeros.
    template <class S, class P> void retrieval_rows(const S* x, int64_t count, int64_t d, int64_t rows, int64_t depth, P* out);
    // factors[r] = scale_r, divided by the norm of scale_r x_r where `normalize`.
    template <class S, class A>
    void retrieval_factors(const S* x, int64_t count, int64_t d, const A* scale, bool normalize, A* factors);
    // tile [kTileRows][width]: the similarities of block `block` of queries to keys [kTileRows, depth], of which `rows` are
    // keys and the others zeros; b: [rows] or null.
    template <class P>
    void retrieval_tile(const Similarities<P>&, int64_t block, const P* keys, int64_t rows, const acc_t<P>* b, acc_t<P>* tile);
    // out [n][ldo]: the similarities of n queries [n, d] to `count` keys [count, d], multiplied by a: [n] or null, and by
    // b: [count] or null. widened: kFewKeys * d.
    template <class S, class A> void retrieval_few(const A* queries, int64_t n, const S* keys, int64_t count, int64_t d,
                                                   const A* a, const A* b, A* widened, A* out, int64_t ldo);
    // Whether a query in [i0, i0 + cols) and a key in [j0, j0 + rows) match.
    bool retrieval_any_match(const Labels&, int64_t i0, int64_t cols, int64_t j0, int64_t rows);
    // Takes the matches of a tile [rows][ld] into the best of its queries and, unless their score is null, of its keys.
    template <class A> void retrieval_best(const Labels&, int64_t i0, int64_t cols, int64_t j0, int64_t rows, const A* tile,
                                           int64_t ld, const BestMatch<A>& queries, const BestMatch<A>& keys);)

}  // namespace vlmk
