#pragma once
#include "vlmkernels/isa.h"
#include "vlmkernels/pairwise.h"

namespace vlmk {

// S_ij = scale a_i b_j <q_i, k_j>; r_i = logsumexp_j S_ij; c_j = logsumexp_i S_ij.

// A stored tile: this header, then [kTileRows][kTileCols] of e_ij = exp(S_ij - reference) in the operands' type, 0 beyond the
// tile's rows and columns and at positives. A tile whose rows or columns lie too far below its maximum for that is marked.
constexpr int64_t kTileHeader = 64;  // its size and that of the tile are known in vlmkernels/_native.py too
enum class TileKind : int64_t { relative, weighted, absent };
struct TileInfo {
  double reference;
  TileKind kind;
  int64_t element_size;  // of the operands' type it was written in
};
template <class P>
constexpr int64_t tile_bytes() {
  return kTileHeader + kTileSize * static_cast<int64_t>(sizeof(P));
}

// Of a set of logits: the maximum, sum of exp(S - maximum), and sum of exp(S - maximum) (S - maximum).
template <class A>
struct Moments {
  A *max, *sum, *moment;
  Moments at(int64_t offset) const { return {max + offset, sum + offset, moment + offset}; }
};

template <class P>
struct InfoNceStats {
  Pairs<P> pairs;
  const int64_t* positives;  // [n], -1: none
  bool columns;
  int64_t chunk_rows, chunk_cols;  // in blocks: the part of S that one call sees
  Moments<acc_t<P>> rows;          // [col chunks][n]
  Moments<acc_t<P>> cols;          // [row chunks][m], when columns
  acc_t<P>* positive_logit;        // [n], written where the positive lies in the chunk
  char* store;                     // [stored_tiles] tiles, in the order of row-major tile indices
  int64_t stored_tiles;
};

template <class P>
struct InfoNceGrads {
  Pairs<P> pairs;
  const int64_t* positives;                     // [n], -1: none
  const acc_t<P>*row_max, *row_log, *row_coef;  // [n] r = max + log, and u
  const acc_t<P>*col_max, *col_log, *col_coef;  // [m] c = max + log, and v; or null: rows only
  const acc_t<P>* positive_coef;                // [n] w
  const char* store;
  int64_t stored_tiles;
  char* workspace;  // tiles of row blocks [first, last) that are not stored
  int64_t first, last;
  acc_t<P>* key_sums;  // [col blocks][d][kTileCols]
  Finish<P> query, key;
};

VLMK_PER_ISA(
    // Statistics of one chunk of S. scratch: kTileSize + 3 * kTileCols.
    template <class P> void info_nce_stats(const InfoNceStats<P>&, int64_t row_chunk, int64_t col_chunk, acc_t<P>* scratch);
    // Joins the moments [parts][count] of the chunks in [begin, end).
    template <class A>
    void info_nce_merge(Moments<A> parts, int64_t part_count, int64_t count, int64_t begin, int64_t end, Moments<A> out);
    // Fills the workspace's tile (ib, jb). scratch: kTileSize.
    template <class P> void info_nce_recompute(const InfoNceGrads<P>&, int64_t ib, int64_t jb, acc_t<P>* scratch);
    // dq of row block ib. sums: kTileRows * depth; scratch: a tile; operand: two tiles.
    template <class P> void info_nce_query(const InfoNceGrads<P>&, int64_t ib, acc_t<P>* sums, acc_t<P>* scratch, P* operand);
    // Adds the row blocks [first, last) to columns [d0, d1) of block jb's key_sums. scratch: a tile; operand: kKeyTiles + 1
    // tiles.
    template <class P> void info_nce_key(const InfoNceGrads<P>&, int64_t jb, int64_t d0, int64_t d1, bool accumulate,
                                         acc_t<P>* scratch, P* operand);
    // dk of column block jb from its key_sums. rows: kTileCols * d.
    template <class P> void info_nce_finish_key(const InfoNceGrads<P>&, int64_t jb, acc_t<P>* rows);)

}  // namespace vlmk
