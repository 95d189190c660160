#include "attention.h"

namespace vlmk::VLMK_ISA {
namespace {

// Tiles are transposed, [keys][queries]: what belongs to one query stays in one lane.
template <class P>
struct ForwardScratch {
  using A = acc_t<P>;
  P* qt;                                  // [depth][kQueryBlock] B operand
  A* s;                                   // [key_block][kQueryBlock]
  P* p;                                   // the same as a B operand; of full precision in place of s
  A* o;                                   // [dv][kQueryBlock]
  A* rows;                                // [kQueryBlock][dv]
  A *top, *sum, *keep;                    // [kQueryBlock]
  typename Vectors<A>::Index *from, *to;  // [kQueryBlock]
  int64_t slots;                          // packed key blocks that are held
  P* k;                                   // [slots][key_block][depth] A operands
  P* vt;                                  // [slots][dv][key_block] A operands
  int64_t* held;                          // [slots] which block of which source
  int64_t bytes;

  ForwardScratch(const Attention<P>& g, int64_t query_blocks, char* base) {
    Carve carve{base};
    qt = carve.take<P>(kQueryBlock * g.depth);
    s = carve.take<A>(kQueryBlock * g.key_block);
    if constexpr (kPaired<P>) {
      p = carve.take<P>(kQueryBlock * g.key_block);
    } else {
      p = s;
    }
    o = carve.take<A>(kQueryBlock * g.dv);
    rows = carve.take<A>(kQueryBlock * g.dv);
    top = carve.take<A>(kQueryBlock);
    sum = carve.take<A>(kQueryBlock);
    keep = carve.take<A>(kQueryBlock);
    from = carve.take<typename Vectors<A>::Index>(kQueryBlock);
    to = carve.take<typename Vectors<A>::Index>(kQueryBlock);
    slots = 0;
    for (int64_t n = 0; n < g.sources; ++n) slots += ceil_div(g.source[n].count, g.key_block);
    slots = query_blocks > 1 ? min_(slots, kHeldKeys / g.key_block) : 1;
    k = carve.take<P>(slots * g.key_block * g.depth);
    vt = carve.take<P>(slots * g.key_block * g.dv);
    held = carve.take<int64_t>(slots);
    bytes = carve.at - base;
  }
};

// One tile of logits [keys][width] joins the softmax: with z = factor s, top takes in the tile's maxima, p =
// exp(z - top), sum takes in their sums after keep = exp(old top - top). Returns whether any query's top has moved. What is not
// seen becomes 0; a query that sees nothing keeps its top at -inf.
template <bool kMasked, class P>
bool join_softmax(acc_t<P>* s, int64_t keys, int64_t width, int64_t j0, acc_t<P> factor, const ForwardScratch<P>& w) {
  using A = acc_t<P>;
  constexpr int64_t lanes = Vectors<A>::lanes;
  const Vec<A> nothing = Vec<A>{} + kNothing<A>;
  bool moved = false;
  for (int64_t i = 0; i < width; i += lanes) {
    Vec<A> high[4] = {nothing, nothing, nothing, nothing};
    for (int64_t j = 0; j < keys; j += 4) {
      for (int64_t x = 0; x < 4; ++x) {
        A* at = s + (j + x) * width + i;
        Vec<A> z = load<Vec<A>>(at) * factor;
        if constexpr (kMasked) {
          z = sees<A>(w.from + i, w.to + i, j0 + j + x) ? z : nothing;
          store(z, at);
        }
        high[x] = max_of(high[x], z);
      }
    }
    const Vec<A> old = load<Vec<A>>(w.top + i);
    const Vec<A> top = max_of(max_of(max_of(high[0], high[1]), max_of(high[2], high[3])), old);
    const Vec<A> finite = top > nothing ? top : Vec<A>{}, keep = exp_of(old - finite);
    for (int64_t x = 0; x < lanes; ++x) moved |= top[x] > old[x];
    store(top, w.top + i);
    store(keep, w.keep + i);
    Vec<A> sum[2] = {load<Vec<A>>(w.sum + i) * keep, Vec<A>{}};
    for (int64_t j = 0; j < keys; j += 2) {
      A* at = s + j * width + i;
      const A unit = kMasked ? A(1) : factor;
      const Vec<A> first = exp_of(load<Vec<A>>(at) * unit - finite), second = exp_of(load<Vec<A>>(at + width) * unit - finite);
      sum[0] += first;
      sum[1] += second;
      if constexpr (kPaired<P>) {
        store(paired(first, second), w.p + j * width + 2 * i);
      } else {
        store(first, at);
        store(second, at + width);
      }
    }
    store(sum[0] + sum[1], w.sum + i);
  }
  return moved;
}

// Transposed results [dv][width] as rows, divided by the sums.
template <class P>
void write_rows(const Attention<P>& g, int64_t b, int64_t h, int64_t q0, int64_t rows, int64_t width, bool any,
                const ForwardScratch<P>& w) {
  using A = acc_t<P>;
  transpose(w.o, width, g.dv, rows, w.rows, g.dv);
  for (int64_t r = 0; r < rows; ++r) {
    const bool seen = any && w.sum[r] != 0;
    const A inverse = 1 / w.sum[r], *row = w.rows + r * g.dv;
    P* out = row_of(g.out, b, h, q0 + r);
#pragma omp simd
    for (int64_t c = 0; c < g.dv; ++c) from_acc(seen ? row[c] * inverse : A(0), out[c]);
    g.lse[(b * g.heads + h) * g.tq + q0 + r] = seen ? w.top[r] + std::log(w.sum[r]) : kNothing<A>;
  }
}

}  // namespace

template <class P>
int64_t attention_forward_scratch(const Attention<P>& g, int64_t query_blocks) {
  return ForwardScratch<P>(g, query_blocks, nullptr).bytes;
}

template <class P>
void attention_forward(const Attention<P>& g, int64_t b, int64_t h, int64_t part, int64_t parts, char* scratch) {
  using A = acc_t<P>;
  const ForwardScratch<P> w(g, ceil_div(ceil_div(g.tq, kQueryBlock) - part, parts), scratch);
  const int64_t block = g.key_block, kv_head = h / (g.heads / g.kv_heads);
  const A* table = g.bias ? g.bias + h * table_size(g) : nullptr;
  const A factor = table ? A(1) : g.scale;
  for (int64_t slot = 0; slot < w.slots; ++slot) w.held[slot] = -1;
  for (int64_t q0 = part * kQueryBlock; q0 < g.tq; q0 += parts * kQueryBlock) {
    const int64_t rows = min_(kQueryBlock, g.tq - q0), width = tile_width<P>(rows);
    pack_transposed_b(row_of(g.q, b, h, q0), g.q.token, rows, g.dh, g.depth, width, w.qt);
    for (int64_t r = 0; r < width; ++r) w.top[r] = kNothing<A>, w.sum[r] = 0;
    bool any = false;
    for (int64_t n = 0, before = 0; n < g.sources; ++n) {
      const Source<P>& source = g.source[n];
      const int32_t *begin = source.begin + b * source.interval_batch + q0, *end = source.end + b * source.interval_batch + q0;
      const Span span = span_of(begin, end, rows);
      bounds_of<A>(begin, end, rows, w.from, w.to);
      for (int64_t j0 = span.lo / block * block; j0 < span.hi; j0 += block) {
        const auto [c0, c1] = columns_of(span, j0, block);
        const int64_t keys = c1 - c0;
        const int64_t index = before + j0 / block, slot = index % w.slots;
        P *k = w.k + slot * block * g.depth, *vt = w.vt + slot * block * g.dv;
        if (w.held[slot] != index) {
          const int64_t count = min_(block, source.count - j0);
          copy_rows(row_of(source.k, b, kv_head, j0), source.k.token, count, g.dh, g.depth, block, k);
          pack_transposed_a(row_of(source.v, b, kv_head, j0), source.v.token, count, g.dv, block, vt);
          w.held[slot] = index;
        }
        g.product(keys, width, g.depth, g.depth, width, width, false, k + c0 * g.depth, w.qt, w.s);
        if (table) add_bias(g, table, q0, rows, width, j0 + c0, keys, w.s);
        const bool all_seen = span.inner_lo <= j0 + c0 && span.inner_hi >= j0 + c1;
        const bool moved = all_seen ? join_softmax<false>(w.s, keys, width, j0 + c0, factor, w)
                                    : join_softmax<true>(w.s, keys, width, j0 + c0, factor, w);
        for (int64_t c = 0; any && moved && c < g.dv; ++c) {
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) w.o[c * width + i] *= w.keep[i];
        }
        g.product(g.dv, width, keys, block, width, width, any, vt + c0, w.p, w.o);
        any = true;
      }
      before += ceil_div(source.count, block);
    }
    write_rows(g, b, h, q0, rows, width, any, w);
  }
}

template <class P>
int64_t attention_rows_scratch(const Attention<P>& g) {
  int64_t keys = 0;
  for (int64_t n = 0; n < g.sources; ++n) keys = max_(keys, g.source[n].count);
  return (keys + g.dh + g.dv) * static_cast<int64_t>(sizeof(acc_t<P>)) + 192;
}

template <class P>
void attention_rows(const Attention<P>& g, int64_t b, int64_t h, char* scratch) {
  using A = acc_t<P>;
  Carve carve{scratch};
  A *q = carve.take<A>(g.dh), *o = carve.take<A>(g.dv), *s = carve.take<A>(0);
  const int64_t kv_head = h / (g.heads / g.kv_heads);
  const A* table = g.bias ? g.bias + h * table_size(g) : nullptr;
  for (int64_t i = 0; i < g.tq; ++i) {
    const P* query = row_of(g.q, b, h, i);
    for (int64_t c = 0; c < g.dh; ++c) q[c] = to_acc(query[c]) * g.scale;
    for (int64_t c = 0; c < g.dv; ++c) o[c] = 0;
    A top = kNothing<A>, sum = 0;
    for (int64_t n = 0; n < g.sources; ++n) {
      const Source<P>& source = g.source[n];
      const int64_t at = b * source.interval_batch + i, begin = source.begin[at], end = source.end[at];
      for (int64_t j = begin; j < end; ++j) {
        const P* k = row_of(source.k, b, kv_head, j);
        A dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t c = 0; c < g.dh; ++c) dot += q[c] * to_acc(k[c]);
        s[j - begin] = dot;
      }
      for (int64_t j = begin; table && j < end; ++j) {
        for_query_runs(g, i, i + 1, j, [&](int64_t, int64_t entry, int64_t) { s[j - begin] += table[entry]; });
      }
      A high = top, total = 0;
#pragma omp simd reduction(max : high)
      for (int64_t x = 0; x < end - begin; ++x) high = max_(high, s[x]);
      if (high == kNothing<A>) continue;
      const A keep = exp_(top - high);
      for (int64_t c = 0; c < g.dv; ++c) o[c] *= keep;
#pragma omp simd reduction(+ : total)
      for (int64_t x = 0; x < end - begin; ++x) total += s[x] = exp_(s[x] - high);
      sum = sum * keep + total;
      top = high;
      for (int64_t j = begin; j < end; ++j) add_scaled(g.dv, s[j - begin], row_of(source.v, b, kv_head, j), o);
    }
    const bool seen = sum != 0;
    P* out = row_of(g.out, b, h, i);
    for (int64_t c = 0; c < g.dv; ++c) from_acc(seen ? o[c] / sum : A(0), out[c]);
    g.lse[(b * g.heads + h) * g.tq + i] = seen ? top + std::log(sum) : kNothing<A>;
  }
}

#define VLMK_INSTANTIATE(P)                                                                        \
  template int64_t attention_forward_scratch(const Attention<P>&, int64_t);                        \
  template int64_t attention_rows_scratch(const Attention<P>&);                                    \
  template void attention_forward(const Attention<P>&, int64_t, int64_t, int64_t, int64_t, char*); \
  template void attention_rows(const Attention<P>&, int64_t, int64_t, char*);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)

}  // namespace vlmk::VLMK_ISA
