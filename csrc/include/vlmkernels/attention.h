#pragma once
#include "vlmkernels/isa.h"
#include "vlmkernels/tile_gemm.h"

namespace vlmk {

// Attention over one or two sources of keys; query i of sample b attends to keys [begin_bi, end_bi) of each:
//   s_ij = scale <q_i, k_j> + bias_ij    p_i = softmax of s_i over all sources    out_i = sum_j p_ij v_j    lse_i = log sum
//   e^s_ij

// [batch, heads, tokens, width] with the strides of all dimensions but the last, which is contiguous.
template <class T>
struct Tokens {
  T* data;
  int64_t batch, head, token;
};

template <class P>
struct Source {
  Tokens<const P> k, v;  // [batch, kv_heads, count, dh | dv]
  int64_t count;
  const int32_t *begin, *end;  // [batch][tq], 0 <= begin, end <= count; samples `interval_batch` apart
  int64_t interval_batch;      // 0: shared by all samples
  Tokens<P> dk, dv;            // written by the backward where needed
};

template <class P>
struct Attention {
  int64_t batch, heads, kv_heads, tq, dh, dv;
  int64_t depth, width;  // depth_of<P> of dh and dv: what products see
  Tokens<const P> q;     // [batch, heads, tq, dh]
  Source<P> source[2];
  int64_t sources;
  int64_t key_block;  // a multiple of kKeyUnit
  bool once;          // the forward visits every block of keys once: values are not packed
  acc_t<P> scale;
  const acc_t<P>* bias;  // [heads][2R-1][2C-1] for keys and queries on the grid, or null
  int64_t grid_rows, grid_cols;
  Tokens<P> out;  // [batch, heads, tq, dv]
  acc_t<P>* lse;  // [batch][heads][tq]
  TileProduct<P> product;
};

template <class P>
struct AttentionGrads {
  Attention<P> attention;  // out and lse as the forward gave them
  Tokens<const P> dout;    // [batch, heads, tq, dv]
  const acc_t<P>* dlse;    // [batch][heads][tq] or null
  Tokens<P> dq;
  bool need_q, need_k, need_v;
  int64_t chunks;       // tasks that share the keys of one head, in alternating pieces of key_chunk keys
  int64_t key_chunk;    // keys whose operands and gradients are in memory at once, a multiple of kGradKeys
  acc_t<P>* dq_parts;   // chunks > 1: [chunks][batch][heads][query blocks][dh][kQueryBlock]
  uint8_t* dq_touched;  // chunks > 1: [chunks][batch][heads][query blocks]
  double* dbias_parts;  // [batch][chunks][heads][2R-1][2C-1] or null
};

constexpr int64_t kFewQueries = 2;   // with so few, packing keys and values would cost more than the products
constexpr int64_t kQueryBlock = 64;  // queries of a tile
constexpr int64_t kKeyUnit = 64;     // blocks of keys are a multiple of it
constexpr int64_t kHeldKeys = 4096;  // packed keys that the forward holds at most
constexpr int64_t kGradKeys = 128;   // keys of a tile of the backward

VLMK_PER_ISA(
    // Bytes of scratch that the functions below need.
    template <class P> int64_t attention_forward_scratch(const Attention<P>&);
    template <class P> int64_t attention_rows_scratch(const Attention<P>&);
    template <class P> int64_t attention_backward_scratch(const AttentionGrads<P>&);
    // Query blocks part, part + parts, ... of one head.
    template <class P>
    void attention_forward(const Attention<P>&, int64_t b, int64_t h, int64_t part, int64_t parts, char* scratch);
    // The same for at most kFewQueries queries, one after the other, with keys and values read in place.
    template <class P> void attention_rows(const Attention<P>&, int64_t b, int64_t h, char* scratch);
    // Key gradients of one chunk of the keys of one key head, and query gradients, in parts if chunks > 1.
    template <class P>
    void attention_backward(const AttentionGrads<P>&, int64_t b, int64_t kv_head, int64_t chunk, char* scratch);
    // Adds the parts of query gradients of one query block. scratch: 2 * dh * kQueryBlock.
    template <class P>
    void attention_join_query(const AttentionGrads<P>&, int64_t b, int64_t h, int64_t query_block, acc_t<P>* scratch);)

}  // namespace vlmk
