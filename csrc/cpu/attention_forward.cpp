#include "attention.h"

namespace vlmk::VLMK_ISA {
namespace {

// Tiles are transposed, [keys][queries]: what belongs to one query stays in one lane. With several query blocks the values are
// packed as V^T and the result is transposed too; with one (`once`), packing would serve it alone: the probabilities are turned
// into rows and multiply the values as they are.
template <class P>
struct ForwardScratch {
  using A = acc_t<P>;
  P* qt;                                  // [depth][kQueryBlock] B operand
  A* s;                                   // [key_block][kQueryBlock]
  P* p;                                   // the same as an operand; of full precision in place of s
  A* turned;                              // once: [kQueryBlock][key_block]
  A* o;                                   // [dv][kQueryBlock]; once: [kQueryBlock][width]
  A* rows;                                // [kQueryBlock][width]
  A *top, *sum, *keep;                    // [kQueryBlock]
  typename Vectors<A>::Index *from, *to;  // [kQueryBlock]
  int64_t slots;                          // key blocks that are held packed
  P* k;                                   // [slots][key_block][depth] A operands, where the keys do not serve as they are
  P* v;                                   // [slots][dv][key_block] A operands; once: [key_block][width] B operand
  int64_t* held;                          // [slots] which block of which source
  int64_t bytes;

  ForwardScratch(const Attention<P>& g, char* base) {
    Scratch pieces{base};
    qt = pieces.take<P>(kQueryBlock * g.depth);
    s = pieces.take<A>(kQueryBlock * g.key_block);
    turned = pieces.take<A>(g.once ? kQueryBlock * g.key_block : 0);
    p = kPaired<P> ? pieces.take<P>(kQueryBlock * g.key_block) : reinterpret_cast<P*>(g.once ? turned : s);
    o = pieces.take<A>(kQueryBlock * g.width);
    rows = pieces.take<A>(kQueryBlock * g.width);
    top = pieces.take<A>(kQueryBlock);
    sum = pieces.take<A>(kQueryBlock);
    keep = pieces.take<A>(kQueryBlock);
    from = pieces.take<typename Vectors<A>::Index>(kQueryBlock);
    to = pieces.take<typename Vectors<A>::Index>(kQueryBlock);
    slots = 0;
    for (int64_t n = 0; n < g.sources; ++n) slots += ceil_div(g.source[n].count, g.key_block);
    slots = g.once ? 1 : min_(slots, kHeldKeys / g.key_block);
    k = pieces.take<P>(slots * g.key_block * g.depth);
    v = pieces.take<P>(slots * g.key_block * g.width);
    held = pieces.take<int64_t>(slots);
    bytes = pieces.next - base;
  }
};

// One tile of products [keys][width] joins the softmax: with z the logits, top takes in the tile's maxima, p =
// exp(z - top), sum takes in their sums after keep = exp(old top - top). Returns whether any query's top has moved. What is not
// seen becomes 0; a query that sees nothing keeps its top at -inf.
template <bool kMasked, bool kPairs, class P>
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
        Vec<A> z = logits_at<P>(at, factor);
        if constexpr (kMasked) {
          z = sees<A>(w.from + i, w.to + i, j0 + j + x) ? z : nothing;
          store(z, at);
        }
        high[x] = max_(high[x], z);
      }
    }
    const Vec<A> old = load<Vec<A>>(w.top + i);
    const Vec<A> top = max_(max_(max_(high[0], high[1]), max_(high[2], high[3])), old);
    const Vec<A> finite = top > nothing ? top : Vec<A>{}, keep = exp_or_zero(old - finite);
    for (int64_t x = 0; x < lanes; ++x) moved |= top[x] > old[x];
    store(top, w.top + i);
    store(keep, w.keep + i);
    Vec<A> total{};
    for (int64_t j0 = 0; j0 < keys; j0 += 2 * kSumRows) {
      Vec<A> sum[2] = {};
      for (int64_t j = j0; j < min_(j0 + 2 * kSumRows, keys); j += 2) {
        A* at = s + j * width + i;
        const A rest = kMasked ? A(1) : factor;
        const Vec<A> first = exp_or_zero(logits_at<P>(at, rest) - finite),
                     second = exp_or_zero(logits_at<P>(at + width, rest) - finite);
        sum[0] += first;
        sum[1] += second;
        if constexpr (kPairs) {
          store(paired(first, second), w.p + j * width + 2 * i);
        } else {
          store(first, at);
          store(second, at + width);
        }
      }
      total += sum[0] + sum[1];
    }
    store(load<Vec<A>>(w.sum + i) * keep + total, w.sum + i);
  }
  return moved;
}

template <class P>
bool join_tile(int64_t keys, int64_t width, int64_t j0, bool all_seen, acc_t<P> factor, bool once, const ForwardScratch<P>& w) {
  if constexpr (kPaired<P>) {
    if (!once) {
      return all_seen ? join_softmax<false, true>(w.s, keys, width, j0, factor, w)
                      : join_softmax<true, true>(w.s, keys, width, j0, factor, w);
    }
  }
  return all_seen ? join_softmax<false, false>(w.s, keys, width, j0, factor, w)
                  : join_softmax<true, false>(w.s, keys, width, j0, factor, w);
}

// o takes in p V of one tile, for several query blocks: o [dv][width] += V^T p.
template <class P>
void add_values(const Attention<P>& g, const P* vt, int64_t keys, int64_t width, bool any, bool moved,
                const ForwardScratch<P>& w) {
  for (int64_t c = 0; any && moved && c < g.dv; ++c) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) w.o[c * width + i] *= w.keep[i];
  }
  g.product(g.dv, width, keys, g.key_block, width, width, any, vt, w.p, w.o);
}

// The same for one query block: o [rows][width] += p V, the values of keys [j, j + keys) taken as they are where they can be.
template <class P>
void add_values_once(const Attention<P>& g, const Source<P>& source, int64_t b, int64_t kv_head, int64_t j, int64_t keys,
                     int64_t rows, int64_t width, bool any, const ForwardScratch<P>& w) {
  const P* v = row_of(source.v, b, kv_head, j);
  int64_t ld = source.v.token;
  if (kPaired<P> || j + keys > source.count) {
    rows_as_b(v, source.v.token, min_(keys, source.count - j), g.dv, g.width, keys, w.v);
    v = w.v, ld = g.width;
  }
  transpose(w.s, width, keys, width, w.turned, g.key_block);
  int64_t padded = 1;
  while (padded < rows) padded *= 2;
  if constexpr (kPaired<P>) {
    for (int64_t r = 0; r < padded; ++r) {
      for (int64_t c = 0; c < keys; c += Vectors<float>::lanes) {
        store_rounded(load<Vec<float>>(w.turned + r * g.key_block + c), w.p + r * g.key_block + c);
      }
    }
  }
  for (int64_t r = 0; any && r < rows; ++r) {
    if (w.keep[r] == 1) continue;
    for (int64_t c = 0; c < g.width; ++c) w.o[r * g.width + c] *= w.keep[r];
  }
  g.product(padded, g.width, keys, g.key_block, ld, g.width, any, w.p, v, w.o);
}

// The results as rows, divided by the sums.
template <class P>
void write_rows(const Attention<P>& g, int64_t b, int64_t h, int64_t q0, int64_t rows, int64_t width, bool any,
                const ForwardScratch<P>& w) {
  using A = acc_t<P>;
  if (!g.once) transpose(w.o, width, g.dv, rows, w.rows, g.width);
  for (int64_t r = 0; r < rows; ++r) {
    const bool seen = any && w.sum[r] != 0;
    const A inverse = 1 / w.sum[r], *row = (g.once ? w.o : w.rows) + r * g.width;
    P* out = row_of(g.out, b, h, q0 + r);
#pragma omp simd
    for (int64_t c = 0; c < g.dv; ++c) from_acc(seen ? row[c] * inverse : A(0), out[c]);
    g.lse[(b * g.heads + h) * g.tq + q0 + r] = seen ? w.top[r] + std::log(w.sum[r]) : kNothing<A>;
  }
}

}  // namespace

template <class P>
int64_t attention_forward_scratch(const Attention<P>& g) {
  return ForwardScratch<P>(g, nullptr).bytes;
}

template <class P>
void attention_forward(const Attention<P>& g, int64_t b, int64_t h, int64_t part, int64_t parts, char* scratch) {
  using A = acc_t<P>;
  const ForwardScratch<P> w(g, scratch);
  const int64_t block = g.key_block, kv_head = h / (g.heads / g.kv_heads);
  const A* table = g.bias ? g.bias + h * table_size(g) : nullptr;
  const A factor = table ? A(1) : g.scale;
  for (int64_t slot = 0; slot < w.slots; ++slot) w.held[slot] = -1;
  for (int64_t q0 = part * kQueryBlock; q0 < g.tq; q0 += parts * kQueryBlock) {
    const int64_t rows = min_(kQueryBlock, g.tq - q0), width = tile_width<P>(rows);
    pack_queries(g, row_of(g.q, b, h, q0), rows, width, w.qt);
    for (int64_t r = 0; r < width; ++r) w.top[r] = kNothing<A>, w.sum[r] = 0;
    bool any = false;
    for (int64_t n = 0, before = 0; n < g.sources; ++n) {
      const Source<P>& source = g.source[n];
      const int32_t *begin = source.begin + b * source.interval_batch + q0, *end = source.end + b * source.interval_batch + q0;
      const Span span = span_of(begin, end, rows);
      bounds_of<A>(begin, end, rows, w.from, w.to);
      for (int64_t j0 = span.lo / block * block; j0 < span.hi; j0 += block) {
        const auto [c0, c1] = columns_of<P>(span, j0, block);
        const int64_t keys = c1 - c0;
        const int64_t index = before + j0 / block, slot = index % w.slots, count = min_(block, source.count - j0);
        const bool as_it_is = count == block && g.depth == g.dh;
        P *packed_k = w.k + slot * block * g.depth, *vt = w.v + slot * block * g.dv;
        const P* key = row_of(source.k, b, kv_head, j0);
        if (w.held[slot] != index) {
          if (!as_it_is) copy_rows(key, source.k.token, count, g.dh, g.depth, block, packed_k);
          if (!g.once) pack_transposed_a(row_of(source.v, b, kv_head, j0), source.v.token, count, g.dv, block, vt);
          w.held[slot] = index;
        }
        const P* k = as_it_is ? key : packed_k;
        const int64_t ldk = as_it_is ? source.k.token : g.depth;
        g.product(keys, width, g.depth, ldk, width, width, false, k + c0 * ldk, w.qt, w.s);
        if (table) add_bias(g, table, q0, rows, width, j0 + c0, keys, g.scale, w.s);
        const bool all_seen = span.inner_lo <= j0 + c0 && span.inner_hi >= j0 + c1;
        const bool moved = join_tile(keys, width, j0 + c0, all_seen, factor, g.once, w);
        if (g.once) {
          add_values_once(g, source, b, kv_head, j0 + c0, keys, rows, width, any, w);
        } else {
          add_values(g, vt + c0, keys, width, any, moved, w);
        }
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
  return (keys + g.dh + 2 * g.dv) * static_cast<int64_t>(sizeof(acc_t<P>)) + 256;
}

namespace {

template <class P>
VLMK_INLINE Vec<acc_t<P>> widened(const P* step, int64_t half) {
  if constexpr (kPaired<P>) {
    const auto words = load<Vec<uint32_t>>(step);
    return __builtin_bit_cast(Vec<float>, half ? words & 0xffff0000u : words << 16);
  } else {
    return load<Vec<acc_t<P>>>(step);
  }
}

// o += sum_x p_x v_x for few rows, the features of whole steps of o in their places.
template <class P>
void add_some(const acc_t<P>* p, const P* v, int64_t ld, int64_t count, int64_t d, acc_t<P>* o) {
  using A = acc_t<P>;
  const int64_t full = d / kStep<P> * kStep<P>;
  for (int64_t x = 0; x < count; x += 4, v += 4 * ld) {
    const int64_t here = min_<int64_t>(4, count - x);
    const P* row[4];
    A weight[4];
    for (int64_t i = 0; i < 4; ++i) row[i] = v + min_(i, here - 1) * ld, weight[i] = i < here ? p[x + i] : A(0);
    for (int64_t c = 0; c < full; c += kStep<P>) {
      for (int64_t half = 0; half < kHalves<P>; ++half) {
        A* to = o + c + half * Vectors<A>::lanes;
        const Vec<A> left = widened(row[0] + c, half) * weight[0] + widened(row[1] + c, half) * weight[1];
        const Vec<A> right = widened(row[2] + c, half) * weight[2] + widened(row[3] + c, half) * weight[3];
        store(load<Vec<A>>(to) + (left + right), to);
      }
    }
    for (int64_t c = full; c < d; ++c) {
      for (int64_t i = 0; i < here; ++i) o[c] += weight[i] * to_acc(row[i][c]);
    }
  }
}

// The same for any number of rows: those of a part are added by themselves, which `part` [d] holds.
template <class P>
void add_rows(const acc_t<P>* p, const P* v, int64_t ld, int64_t count, int64_t d, acc_t<P>* part, acc_t<P>* o) {
  constexpr int64_t rows = 8 * kSumRows;
  for (int64_t x = 0; x < count; x += rows) {
    for (int64_t c = 0; c < d; ++c) part[c] = 0;
    add_some(p + x, v + x * ld, ld, min_(rows, count - x), d, part);
    for (int64_t c = 0; c < d; ++c) o[c] += part[c];
  }
}

}  // namespace

template <class P>
void pack_query(const Attention<P>& g, const P* query, acc_t<P>* q) {
  for (int64_t c = 0; c < g.dh; ++c) q[place_in<P>(c, g.dh)] = to_acc(query[c]) * g.scale;
}

template <class P>
void few_logits(const acc_t<P>* q, const P* k, int64_t ld, int64_t count, int64_t d, acc_t<P>* s) {
  using A = acc_t<P>;
  const int64_t full = d / kStep<P> * kStep<P>;
  for (int64_t x = 0; x < count; x += 4) {
    const int64_t here = min_<int64_t>(4, count - x);
    const P* row[4];
    for (int64_t i = 0; i < 4; ++i) row[i] = k + (x + min_(i, here - 1)) * ld;
    Vec<A> sum[4] = {};
    for (int64_t c = 0; c < full; c += kStep<P>) {
      for (int64_t half = 0; half < kHalves<P>; ++half) {
        const Vec<A> part = load<Vec<A>>(q + c + half * Vectors<A>::lanes);
        for (int64_t i = 0; i < 4; ++i) sum[i] += part * widened(row[i] + c, half);
      }
    }
    constexpr int width = min_<int>(4, Vectors<A>::lanes);
#pragma GCC unroll 2
    for (int64_t i0 = 0; i0 < 4; i0 += width) {
      const Vec<A> totals = sums_of<width, A>(sum + i0);
      for (int64_t i = i0; i < min_(here, i0 + width); ++i) {
        A total = totals[i - i0];
        for (int64_t c = full; c < d; ++c) total += q[c] * to_acc(row[i][c]);
        s[x + i] = total;
      }
    }
  }
}

template <class P>
void attention_rows(const Attention<P>& g, int64_t b, int64_t h, char* scratch) {
  using A = acc_t<P>;
  Scratch pieces{scratch};
  A *q = pieces.take<A>(g.dh), *o = pieces.take<A>(g.dv), *part = pieces.take<A>(g.dv), *s = pieces.take<A>(0);
  const int64_t kv_head = h / (g.heads / g.kv_heads);
  const A* table = g.bias ? g.bias + h * table_size(g) : nullptr;
  for (int64_t i = 0; i < g.tq; ++i) {
    pack_query(g, row_of(g.q, b, h, i), q);
    for (int64_t c = 0; c < g.dv; ++c) o[c] = 0;
    A top = kNothing<A>, sum = 0;
    for (int64_t n = 0; n < g.sources; ++n) {
      const Source<P>& source = g.source[n];
      const int64_t at = b * source.interval_batch + i, begin = source.begin[at], end = source.end[at];
      few_logits(q, row_of(source.k, b, kv_head, begin), source.k.token, end - begin, g.dh, s);
      for (int64_t j = begin; table && j < end; ++j) {
        for_query_runs(g, i, i + 1, j, [&](int64_t, int64_t entry, int64_t) { s[j - begin] += table[entry]; });
      }
      A high = top;
#pragma omp simd reduction(max : high)
      for (int64_t x = 0; x < end - begin; ++x) high = max_(high, s[x]);
      if (high == kNothing<A>) continue;
      const A keep = exp_(top - high);
      for (int64_t c = 0; c < g.dv; ++c) o[c] *= keep;
      double total = 0;
      for (int64_t x0 = 0; x0 < end - begin; x0 += kSumPart) {
        A part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t x = x0; x < min_(x0 + kSumPart, end - begin); ++x) part += s[x] = exp_(s[x] - high);
        total += part;
      }
      sum = static_cast<A>(sum * keep + total);
      top = high;
      add_rows(s, row_of(source.v, b, kv_head, begin), source.v.token, end - begin, g.dv, part, o);
    }
    const bool seen = sum != 0;
    P* out = row_of(g.out, b, h, i);
    for (int64_t c = 0; c < g.dv; ++c) from_acc(seen ? o[place_in<P>(c, g.dv)] / sum : A(0), out[c]);
    g.lse[(b * g.heads + h) * g.tq + i] = seen ? top + std::log(sum) : kNothing<A>;
  }
}

#define VLMK_INSTANTIATE(P)                                                                        \
  template int64_t attention_forward_scratch(const Attention<P>&);                                 \
  template int64_t attention_rows_scratch(const Attention<P>&);                                    \
  template void pack_query(const Attention<P>&, const P*, acc_t<P>*);                              \
  template void few_logits(const acc_t<P>*, const P*, int64_t, int64_t, int64_t, acc_t<P>*);       \
  template void attention_forward(const Attention<P>&, int64_t, int64_t, int64_t, int64_t, char*); \
  template void attention_rows(const Attention<P>&, int64_t, int64_t, char*);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)

}  // namespace vlmk::VLMK_ISA
