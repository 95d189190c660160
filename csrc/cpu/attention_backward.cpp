#include "attention.h"

namespace vlmk::VLMK_ISA {
namespace {

template <class P>
struct BackwardScratch {
  using A = acc_t<P>;
  P *qt, *dot;                            // [depth | width][kQueryBlock] B operands of the logits and of dP
  P *q, *dout;                            // [kQueryBlock][depth | width] B operands of dk and dv
  A *lse, *slope;                         // [kQueryBlock] log-sum-exp, and <dout, out> - dlse
  typename Vectors<A>::Index *from, *to;  // [kQueryBlock]
  A* rows;                                // [kQueryBlock][dh]
  A* few;                                 // [kFewQueries][dh] queries that are not packed
  A *s, *ds;                              // [kGradKeys][kQueryBlock] transposed tiles
  P *p_a, *ds_a, *ds_b;                   // the same as operands
  P *k, *v;                               // [key_chunk][depth | width] A operands
  P* kt;                                  // [key_chunk / kGradKeys][dh][kGradKeys] A operand of dq
  A *dk, *dv;                             // [key_chunk][depth | width]
  uint8_t* packed;                        // [key_chunk / kGradKeys]
  A* delta;                               // [group][tq]
  A* dq;                                  // [group][query blocks][dh][kQueryBlock], when chunks == 1
  uint8_t* touched;                       // [group][query blocks], when chunks == 1
  int64_t bytes;

  BackwardScratch(const AttentionGrads<P>& grads, char* base) {
    const Attention<P>& g = grads.attention;
    const int64_t group = g.heads / g.kv_heads, blocks = ceil_div(g.tq, kQueryBlock), tile = kGradKeys * kQueryBlock;
    Scratch pieces{base};
    qt = pieces.take<P>(kQueryBlock * g.depth);
    dot = pieces.take<P>(kQueryBlock * g.width);
    q = pieces.take<P>(kQueryBlock * g.depth);
    dout = pieces.take<P>(kQueryBlock * g.width);
    lse = pieces.take<A>(kQueryBlock);
    slope = pieces.take<A>(kQueryBlock);
    from = pieces.take<typename Vectors<A>::Index>(kQueryBlock);
    to = pieces.take<typename Vectors<A>::Index>(kQueryBlock);
    rows = pieces.take<A>(kQueryBlock * g.dh);
    few = pieces.take<A>(kFewQueries * g.dh);
    s = pieces.take<A>(tile);
    ds = pieces.take<A>(tile);
    if constexpr (kPaired<P>) {
      p_a = pieces.take<P>(tile);
      ds_a = pieces.take<P>(tile);
      ds_b = pieces.take<P>(tile);
    } else {
      p_a = s;
      ds_a = ds_b = ds;
    }
    k = pieces.take<P>(grads.key_chunk * g.depth);
    v = pieces.take<P>(grads.key_chunk * g.width);
    kt = pieces.take<P>(grads.key_chunk * g.dh);
    dk = pieces.take<A>(grads.key_chunk * g.depth);
    dv = pieces.take<A>(grads.key_chunk * g.width);
    packed = pieces.take<uint8_t>(grads.key_chunk / kGradKeys);
    delta = pieces.take<A>(group * g.tq);
    const bool whole = grads.chunks == 1 && grads.need_q;
    dq = pieces.take<A>(whole ? group * blocks * g.dh * kQueryBlock : 0);
    touched = pieces.take<uint8_t>(whole ? group * blocks : 0);
    bytes = pieces.next - base;
  }
};

// A tile [keys][width]: p = exp(logit - lse) where the queries see the keys, ds = p (dp - slope).
template <bool kMasked, class P>
void grad_tile(int64_t keys, int64_t width, int64_t j0, acc_t<P> factor, const BackwardScratch<P>& w) {
  using A = acc_t<P>;
  for (int64_t i = 0; i < width; i += Vectors<A>::lanes) {
    const Vec<A> lse = load<Vec<A>>(w.lse + i), slope = load<Vec<A>>(w.slope + i);
    for (int64_t j = 0; j < keys; j += 2) {
      Vec<A> p[2], ds[2];
      for (int64_t x = 0; x < 2; ++x) {
        const int64_t at = (j + x) * width + i;
        p[x] = exp_or_zero(logits_at<P>(w.s + at, factor) - lse);
        ds[x] = p[x] * (load<Vec<A>>(w.ds + at) - slope);
        if constexpr (kMasked) {
          const auto seen = sees<A>(w.from + i, w.to + i, j0 + j + x);
          p[x] = seen ? p[x] : Vec<A>{};
          ds[x] = seen ? ds[x] : Vec<A>{};
        }
        store(ds[x], w.ds + at);
        if constexpr (kPaired<P>) {
          store_rounded(p[x], w.p_a + at);
          store_rounded(ds[x], w.ds_a + at);
        } else {
          store(p[x], w.s + at);
        }
      }
      if constexpr (kPaired<P>) store(paired(ds[0], ds[1]), w.ds_b + j * width + 2 * i);
    }
  }
}

// The tile of logits of a few queries, formed as the forward forms them; keys [seen, keys) are not there.
template <class P>
void few_tile(const Attention<P>& g, const P* k, int64_t ldk, int64_t seen, int64_t keys, int64_t rows, int64_t width,
              const BackwardScratch<P>& w) {
  acc_t<P> logits[kGradKeys];
  for (int64_t i = 0; i < keys * width; ++i) w.s[i] = 0;
  for (int64_t r = 0; r < rows; ++r) {
    few_logits(w.few + r * g.dh, k, ldk, seen, g.dh, logits);
    for (int64_t j = 0; j < seen; ++j) w.s[j * width + r] = logits[j];
  }
}

// The transposed gradients [dh][width] of a query block as rows; none: zeros. rows: kQueryBlock * dh.
template <class P>
void write_query(const AttentionGrads<P>& grads, int64_t b, int64_t h, int64_t q0, const acc_t<P>* dqt, acc_t<P>* flat) {
  const Attention<P>& g = grads.attention;
  const int64_t rows = min_(kQueryBlock, g.tq - q0);
  if (dqt) transpose(dqt, tile_width<P>(rows), g.dh, rows, flat, g.dh);
  for (int64_t r = 0; r < rows; ++r) {
    P* out = row_of(grads.dq, b, h, q0 + r);
#pragma omp simd
    for (int64_t c = 0; c < g.dh; ++c) from_acc(dqt ? g.scale * flat[r * g.dh + c] : acc_t<P>(0), out[c]);
  }
}

// <dout_i, out_i> - dlse_i
template <class P>
void row_slopes(const AttentionGrads<P>& grads, int64_t b, int64_t h, acc_t<P>* delta) {
  const Attention<P>& g = grads.attention;
  for (int64_t i = 0; i < g.tq; ++i) {
    const P *dout = row_of(grads.dout, b, h, i), *out = row_of(g.out, b, h, i);
    delta[i] = dot(dout, out, g.dv);
    if (grads.dlse) delta[i] -= grads.dlse[(b * g.heads + h) * g.tq + i];
  }
}

// The chunk of keys [first, first + count) of a source, for all query heads that share them.
template <class P>
void backward_keys(const AttentionGrads<P>& grads, const BackwardScratch<P>& w, int64_t n, int64_t first, int64_t count,
                   int64_t b, int64_t kv_head, int64_t chunk, acc_t<P>* dq, uint8_t* touched) {
  using A = acc_t<P>;
  const Attention<P>& g = grads.attention;
  const Source<P>& source = g.source[n];
  const int64_t group = g.heads / g.kv_heads, blocks = ceil_div(g.tq, kQueryBlock), key_blocks = ceil_div(count, kGradKeys);
  const bool need_ds = grads.need_q || grads.need_k || grads.dbias_parts;
  const bool few = g.tq <= kFewQueries;
  const A factor = few ? A(1) : g.scale, rest = g.bias ? A(1) : factor;
  for (int64_t jb = 0; jb < key_blocks; ++jb) w.packed[jb] = false;
  for (int64_t member = 0; member < group; ++member) {
    const int64_t h = kv_head * group + member, stats = (b * g.heads + h) * g.tq;
    const A* table = g.bias ? g.bias + h * table_size(g) : nullptr;
    double* dtable =
        grads.dbias_parts ? grads.dbias_parts + ((b * grads.chunks + chunk) * g.heads + h) * table_size(g) : nullptr;
    for (int64_t qb = 0; qb < blocks; ++qb) {
      const int64_t q0 = qb * kQueryBlock, rows = min_(kQueryBlock, g.tq - q0), at = b * source.interval_batch + q0;
      Span span = span_of(source.begin + at, source.end + at, rows);
      span.lo = max_(span.lo, first), span.hi = min_(span.hi, first + count);
      if (span.lo >= span.hi) continue;
      const int64_t width = tile_width<P>(rows);
      const P *query = row_of(g.q, b, h, q0), *dout = row_of(grads.dout, b, h, q0);
      if (few) {
        for (int64_t r = 0; r < rows; ++r) pack_query(g, query + r * g.q.token, w.few + r * g.dh);
      } else {
        pack_queries(g, query, rows, width, w.qt);
      }
      if (need_ds) pack_transposed_b(dout, grads.dout.token, rows, g.dv, g.width, width, w.dot);
      if (grads.need_k) rows_as_b(query, g.q.token, rows, g.dh, g.depth, width, w.q);
      if (grads.need_v) rows_as_b(dout, grads.dout.token, rows, g.dv, g.width, width, w.dout);
      bounds_of<A>(source.begin + at, source.end + at, rows, w.from, w.to);
      for (int64_t r = 0; r < width; ++r) {
        const bool inside = r < rows && g.lse[stats + q0 + r] != kNothing<A>;
        w.lse[r] = inside ? g.lse[stats + q0 + r] : A(0);
        w.slope[r] = inside ? w.delta[member * g.tq + q0 + r] : A(0);
      }
      uint8_t* seen = touched ? touched + member * blocks + qb : nullptr;
      A* dqt = dq ? dq + (member * blocks + qb) * g.dh * kQueryBlock : nullptr;
      for (int64_t jb = (span.lo - first) / kGradKeys; jb * kGradKeys + first < span.hi; ++jb) {
        const int64_t j0 = first + jb * kGradKeys, local = jb * kGradKeys;
        const auto [c0, c1] = columns_of<P>(span, j0, kGradKeys);
        const int64_t keys = c1 - c0;
        P *k = w.k + local * g.depth, *v = w.v + local * g.width, *kt = w.kt + local * g.dh;
        A *dk = w.dk + local * g.depth, *dv = w.dv + local * g.width;
        if (!w.packed[jb]) {
          const int64_t here = min_(kGradKeys, first + count - j0);
          const P *key = row_of(source.k, b, kv_head, j0), *value = row_of(source.v, b, kv_head, j0);
          if (!few) copy_rows(key, source.k.token, here, g.dh, g.depth, kGradKeys, k);
          if (need_ds) copy_rows(value, source.v.token, here, g.dv, g.width, kGradKeys, v);
          if (grads.need_q) pack_transposed_a(key, source.k.token, here, g.dh, kGradKeys, kt);
          for (int64_t i = 0; grads.need_k && i < kGradKeys * g.depth; ++i) dk[i] = 0;
          for (int64_t i = 0; grads.need_v && i < kGradKeys * g.width; ++i) dv[i] = 0;
          w.packed[jb] = true;
        }
        if (few) {
          const int64_t seen = min_(c1, first + count - j0) - c0;
          few_tile(g, row_of(source.k, b, kv_head, j0 + c0), source.k.token, seen, keys, rows, width, w);
        } else {
          g.product(keys, width, g.depth, g.depth, width, width, false, k + c0 * g.depth, w.qt, w.s);
        }
        if (need_ds) g.product(keys, width, g.width, g.width, width, width, false, v + c0 * g.width, w.dot, w.ds);
        if (table) add_bias(g, table, q0, rows, width, j0 + c0, keys, factor, w.s);
        if (span.inner_lo <= j0 + c0 && span.inner_hi >= j0 + c1) {
          grad_tile<false>(keys, width, j0 + c0, rest, w);
        } else {
          grad_tile<true>(keys, width, j0 + c0, rest, w);
        }
        for (int64_t c = 0; dtable && c < keys; ++c) {
          for_query_runs(g, q0, q0 + rows, j0 + c0 + c, [&](int64_t x, int64_t entry, int64_t run) {
            for (int64_t i = 0; i < run; ++i) dtable[entry + i] += w.ds[c * width + x + i];
          });
        }
        if (grads.need_v) {
          g.product(keys, g.width, width, width, g.width, g.width, true, w.p_a, w.dout, dv + c0 * g.width);
        }
        if (grads.need_k) {
          g.product(keys, g.depth, width, width, g.depth, g.depth, true, w.ds_a, w.q, dk + c0 * g.depth);
        }
        if (grads.need_q) {
          g.product(g.dh, width, keys, kGradKeys, width, width, *seen, kt + c0, w.ds_b, dqt);
          *seen = true;
        }
      }
    }
  }
  const auto write = [&](const Tokens<P>& to, const A* sums, int64_t d, int64_t ld, A factor) {
    for (int64_t j = 0; j < count; ++j) {
      P* out = row_of(to, b, kv_head, first + j);
      const bool any = w.packed[j / kGradKeys];
#pragma omp simd
      for (int64_t c = 0; c < d; ++c) from_acc(any ? factor * sums[j * ld + c] : A(0), out[c]);
    }
  };
  if (grads.need_k) write(source.dk, w.dk, g.dh, g.depth, g.scale);
  if (grads.need_v) write(source.dv, w.dv, g.dv, g.width, A(1));
}

}  // namespace

template <class P>
int64_t attention_backward_scratch(const AttentionGrads<P>& grads) {
  return BackwardScratch<P>(grads, nullptr).bytes;
}

template <class P>
void attention_backward(const AttentionGrads<P>& grads, int64_t b, int64_t kv_head, int64_t chunk, char* scratch) {
  using A = acc_t<P>;
  const Attention<P>& g = grads.attention;
  const BackwardScratch<P> w(grads, scratch);
  const int64_t group = g.heads / g.kv_heads, blocks = ceil_div(g.tq, kQueryBlock), first_head = kv_head * group;
  A* dq = nullptr;
  uint8_t* touched = nullptr;
  if (grads.need_q) {
    const int64_t at = ((chunk * g.batch + b) * g.heads + first_head) * blocks;
    dq = grads.chunks > 1 ? grads.dq_parts + at * g.dh * kQueryBlock : w.dq;
    touched = grads.chunks > 1 ? grads.dq_touched + at : w.touched;
    for (int64_t i = 0; i < group * blocks; ++i) touched[i] = false;
  }
  for (int64_t member = 0; member < group; ++member) row_slopes(grads, b, first_head + member, w.delta + member * g.tq);
  if (grads.dbias_parts) {
    double* dbias = grads.dbias_parts + ((b * grads.chunks + chunk) * g.heads + first_head) * table_size(g);
    for (int64_t i = 0; i < group * table_size(g); ++i) dbias[i] = 0;
  }
  for (int64_t n = 0, index = 0; n < g.sources; ++n) {
    const int64_t keys = g.source[n].count;
    for (int64_t first = 0; first < keys; first += grads.key_chunk, ++index) {
      if (index % grads.chunks != chunk) continue;
      backward_keys(grads, w, n, first, min_(grads.key_chunk, keys - first), b, kv_head, chunk, dq, touched);
    }
  }
  if (!grads.need_q || grads.chunks > 1) return;
  for (int64_t i = 0; i < group * blocks; ++i) {
    write_query(grads, b, first_head + i / blocks, i % blocks * kQueryBlock, touched[i] ? dq + i * g.dh * kQueryBlock : nullptr,
                w.rows);
  }
}

template <class P>
void attention_join_query(const AttentionGrads<P>& grads, int64_t b, int64_t h, int64_t query_block, acc_t<P>* scratch) {
  const Attention<P>& g = grads.attention;
  const int64_t blocks = ceil_div(g.tq, kQueryBlock), size = g.dh * kQueryBlock;
  for (int64_t i = 0; i < size; ++i) scratch[i] = 0;
  for (int64_t chunk = 0; chunk < grads.chunks; ++chunk) {
    const int64_t at = ((chunk * g.batch + b) * g.heads + h) * blocks + query_block;
    if (!grads.dq_touched[at]) continue;
    const acc_t<P>* part = grads.dq_parts + at * size;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) scratch[i] += part[i];
  }
  write_query(grads, b, h, query_block * kQueryBlock, scratch, scratch + size);
}

#define VLMK_INSTANTIATE(P)                                                                     \
  template int64_t attention_backward_scratch(const AttentionGrads<P>&);                        \
  template void attention_backward(const AttentionGrads<P>&, int64_t, int64_t, int64_t, char*); \
  template void attention_join_query(const AttentionGrads<P>&, int64_t, int64_t, int64_t, acc_t<P>*);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)

}  // namespace vlmk::VLMK_ISA
