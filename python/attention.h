#pragma once
// Attention over one or two sources of keys: what the bridges of the attention ops share.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "bridge.h"
#include "vlmkernels/attention.h"

namespace vlmk {

// The most keys of a source: their indices, and those of the padding behind them, are int32.
constexpr int64_t kMostKeys = INT32_MAX - 4096;

// query [batch, heads, tq, dh], and of each source key [batch, kv_heads, tk, dh] and value [batch, kv_heads, tk, dv].
struct NeedSource {
  const char* key_name;
  const at::Tensor& key;
  const char* value_name;
  const at::Tensor& value;
};
inline void need_attention(const Need& need, const at::Tensor& query, std::initializer_list<NeedSource> sources) {
  need.tensor("query", query, {kAny, kAny, kAny, kAny}, kFloats);
  const auto type = query.scalar_type();
  const int64_t batch = query.size(0), heads = query.size(1), tq = query.size(2), dh = query.size(3);
  int64_t kv_heads = kAny, dv = kAny;
  for (const NeedSource& source : sources) {
    need.tensor(source.key_name, source.key, {batch, kv_heads, kAny, dh}, type);
    kv_heads = source.key.size(1);
    const int64_t tk = source.key.size(2);
    need.that(tk <= kMostKeys, source.key_name, " must have at most ", kMostKeys, " tokens, got ", tk);
    need.tensor(source.value_name, source.value, {batch, kv_heads, tk, dv}, type);
    dv = source.value.size(3);
    need.countable({need.product({batch, kv_heads}), tk, std::max(dh, dv)});
  }
  need.that(kv_heads ? heads % kv_heads == 0 : heads == 0, "the heads of query must be a multiple of those of key, got ", heads,
            " and ", kv_heads);
  need.countable({need.product({batch, heads}), tq, std::max(dh, dv)});
}

// What the backward reads beside the inputs of the forward.
inline void need_gradient(const Need& need, const at::Tensor& query, int64_t dv, const at::Tensor& dout,
                          const std::optional<at::Tensor>& dlse, const at::Tensor& out, const at::Tensor& lse) {
  const c10::DimVector sizes = with_last(query.sizes(), dv);
  need.tensor("dout", dout, sizes, kFloats);
  need.tensor("out", out, sizes, query.scalar_type());
  const at::IntArrayRef rows = query.sizes().slice(0, 3);
  need.tensor("lse", lse, rows, sum_type(query.scalar_type()));
  need.tensor("dlse", dlse, rows, sum_type(query.scalar_type()));
}

// Keys and values of one source, and where each query sees them: int32 [1 or batch, tq], clipped to the keys there are.
struct KeySource {
  at::Tensor key, value, begin, end;
};

// Tasks that a backward is split into where there are few heads; a fixed number, so that sums do not depend on the threads.
constexpr int64_t kGradTasks = 16;

inline at::Tensor laid_out(const at::Tensor& like, at::IntArrayRef shape, at::ScalarType type) {
  return at::empty({shape[0], shape[2], shape[1], shape[3]}, like.options().dtype(type)).transpose(1, 2);
}

// In the operands' type, features side by side.
template <class P>
at::Tensor operand(const at::Tensor& x) {
  const at::Tensor same = x.to(scalar_type<P>());
  return same.size(-1) <= 1 || same.stride(-1) == 1 ? same : same.contiguous();
}
template <class T>
Tokens<T> tokens(const at::Tensor& x) {
  return {data<std::remove_const_t<T>>(x), x.stride(0), x.stride(1), x.stride(2)};
}

// [tq] or [batch, tq] of int32 or int64, clipped to [0, count].
inline at::Tensor clipped(const at::Tensor& bounds, int64_t count) {
  const at::Tensor rows = bounds.dim() == 1 ? bounds.unsqueeze(0) : bounds;
  const at::Tensor out = at::empty(rows.sizes(), bounds.options().dtype(at::kInt));
  int32_t* to = data<int32_t>(out);
  const auto copy = [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(rows);
    for (int64_t b = 0; b < rows.size(0); ++b) {
      for (int64_t i = 0; i < rows.size(1); ++i) {
        const int64_t bound = from[b * rows.stride(0) + i * rows.stride(1)];
        *to++ = static_cast<int32_t>(std::clamp<int64_t>(bound, 0, count));
      }
    }
  };
  bounds.scalar_type() == at::kLong ? copy(int64_t()) : copy(int32_t());
  return out;
}

// Keys of a tile: short ones where queries see short stretches, as with one image each.
inline int64_t key_block_of(const std::vector<KeySource>& sources) {
  int64_t seen = 0, blocks = 0, longest = 0;
  for (const KeySource& source : sources) {
    const int32_t *begin = data<int32_t>(source.begin), *end = data<int32_t>(source.end);
    const int64_t tq = source.begin.size(1);
    longest = std::max(longest, source.key.size(2));
    for (int64_t b = 0; b < source.begin.size(0); ++b) {
      for (int64_t q0 = 0; q0 < tq; q0 += kQueryBlock, ++blocks) {
        int64_t lo = INT32_MAX, hi = 0;
        for (int64_t i = b * tq + q0; i < b * tq + std::min(q0 + kQueryBlock, tq); ++i) {
          if (begin[i] < end[i]) lo = std::min<int64_t>(lo, begin[i]), hi = std::max<int64_t>(hi, end[i]);
        }
        seen += std::max<int64_t>(0, hi - lo);
      }
    }
  }
  if (seen <= 2 * kKeyUnit * blocks) return kKeyUnit;
  return std::min<int64_t>(256, round_up(longest, kKeyUnit));
}

// Owns the tensors that an Attention<P> points to.
template <class P>
struct AttentionInputs {
  at::Tensor query, bias;
  std::vector<at::Tensor> kept;
  Attention<P> attention{};

  AttentionInputs(const at::Tensor& q, const std::vector<KeySource>& sources, double scale,
                  const std::optional<at::Tensor>& relative_bias, int64_t grid_rows, int64_t grid_cols)
      : query(operand<P>(q)) {
    Attention<P>& g = attention;
    g.batch = q.size(0), g.heads = q.size(1), g.tq = q.size(2), g.dh = q.size(3);
    g.kv_heads = sources[0].key.size(1), g.dv = sources[0].value.size(3);
    g.depth = depth_of<P>(g.dh);
    g.width = depth_of<P>(g.dv);
    g.q = tokens<const P>(query);
    g.sources = static_cast<int64_t>(sources.size());
    for (int64_t n = 0; n < g.sources; ++n) {
      const KeySource& from = sources[n];
      const at::Tensor k = operand<P>(from.key), v = operand<P>(from.value);
      Source<P>& to = g.source[n];
      to.k = tokens<const P>(k), to.v = tokens<const P>(v);
      to.count = k.size(2);
      to.begin = data<int32_t>(from.begin), to.end = data<int32_t>(from.end);
      to.interval_batch = from.begin.size(0) == 1 ? 0 : g.tq;
      kept.insert(kept.end(), {k, v, from.begin, from.end});
    }
    g.key_block = key_block_of(sources);
    g.scale = static_cast<acc_t<P>>(scale);
    if (relative_bias) {
      bias = relative_bias->to(scalar_type<acc_t<P>>()).contiguous();
      g.bias = data<acc_t<P>>(bias);
      g.grid_rows = grid_rows, g.grid_cols = grid_cols;
    }
    g.product = tile_product<P>();
  }
};

// out in the operands' type, and lse.
template <class P>
std::tuple<at::Tensor, at::Tensor> attention_forward(AttentionInputs<P>& inputs) {
  Attention<P>& g = inputs.attention;
  const auto& like = inputs.query;
  const at::Tensor out = laid_out(like, {g.batch, g.heads, g.tq, g.dv}, scalar_type<P>());
  const at::Tensor lse = at::empty({g.batch, g.heads, g.tq}, like.options().dtype(scalar_type<acc_t<P>>()));
  if (g.batch * g.heads * g.tq == 0) return {out, lse};
  g.out = tokens<P>(out);
  g.lse = data<acc_t<P>>(lse);
  const int64_t heads = g.batch * g.heads;
  if (g.tq <= kFewQueries) {
    const int64_t bytes = VLMK_CALL(attention_rows_scratch, g);
    for_tasks(heads, bytes + 64, [&](int64_t task, Scratch& scratch) {
      VLMK_CALL(attention_rows, g, task / g.heads, task % g.heads, scratch.take<char>(bytes));
    });
    return {out, lse};
  }
  const int64_t blocks = ceil_div(g.tq, kQueryBlock);
  const int64_t parts = std::clamp<int64_t>(ceil_div(4 * at::get_num_threads(), heads), 1, blocks);
  // Micro-kernels sum alike in both forms; where mm may not, the number of threads must not choose the form.
  g.once = blocks <= (tile_product_is_mm<P>() ? 1 : parts);
  const int64_t bytes = VLMK_CALL(attention_forward_scratch, g);
  for_tasks(heads * parts, bytes + 64, [&](int64_t task, Scratch& scratch) {
    const int64_t head = task / parts;
    VLMK_CALL(attention_forward, g, head / g.heads, head % g.heads, task % parts, parts, scratch.take<char>(bytes));
  });
  return {out, lse};
}

// Which gradients are wanted, and of each source those of key and value.
struct AttentionNeeds {
  bool query, key, value, bias;
};

template <class P>
struct AttentionResult {
  at::Tensor dquery, dbias;
  std::vector<at::Tensor> dkey, dvalue;
};

template <class P>
AttentionResult<P> attention_backward(AttentionInputs<P>& inputs, const at::Tensor& dout_,
                                      const std::optional<at::Tensor>& dlse_, const at::Tensor& out_, const at::Tensor& lse_,
                                      const AttentionNeeds& needs) {
  using A = acc_t<P>;
  Attention<P>& g = inputs.attention;
  const auto& like = inputs.query;
  const at::Tensor dout = operand<P>(dout_), out = operand<P>(out_), lse = lse_.contiguous();
  const at::Tensor dlse = dlse_ ? dlse_->contiguous() : at::Tensor();
  g.out = tokens<P>(out);
  g.lse = data<A>(lse);
  AttentionGrads<P> grads{};
  grads.dout = tokens<const P>(dout);
  grads.dlse = dlse.defined() ? data<A>(dlse) : nullptr;
  grads.need_q = needs.query, grads.need_k = needs.key, grads.need_v = needs.value;
  AttentionResult<P> result;
  if (needs.query) {
    result.dquery = laid_out(like, {g.batch, g.heads, g.tq, g.dh}, scalar_type<P>());
    grads.dq = tokens<P>(result.dquery);
  }
  int64_t units = 0;
  for (int64_t n = 0; n < g.sources; ++n) {
    Source<P>& source = g.source[n];
    units += ceil_div(source.count, kGradKeys);
    if (needs.key) {
      result.dkey.push_back(laid_out(like, {g.batch, g.kv_heads, source.count, g.dh}, scalar_type<P>()));
      source.dk = tokens<P>(result.dkey.back());
    }
    if (needs.value) {
      result.dvalue.push_back(laid_out(like, {g.batch, g.kv_heads, source.count, g.dv}, scalar_type<P>()));
      source.dv = tokens<P>(result.dvalue.back());
    }
  }
  const int64_t heads = g.batch * g.kv_heads, wanted = ceil_div(kGradTasks, std::max<int64_t>(heads, 1));
  grads.key_chunk = kGradKeys * std::clamp<int64_t>(ceil_div(units, wanted), 1, 4);
  grads.chunks = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, ceil_div(units * kGradKeys, grads.key_chunk)));
  const int64_t blocks = ceil_div(g.tq, kQueryBlock), split = grads.chunks > 1 && needs.query ? grads.chunks : 0;
  const auto sums = like.options().dtype(scalar_type<A>());
  const at::Tensor parts = at::empty({split * g.batch * g.heads * blocks * g.dh * kQueryBlock}, sums);
  const at::Tensor touched = at::empty({split * g.batch * g.heads * blocks}, like.options().dtype(at::kByte));
  grads.dq_parts = data<A>(parts);
  grads.dq_touched = data<uint8_t>(touched);
  at::Tensor dbias;
  if (needs.bias) {
    dbias = at::zeros({g.batch * grads.chunks, g.heads, 2 * g.grid_rows - 1, 2 * g.grid_cols - 1}, sums.dtype(at::kDouble));
    grads.dbias_parts = data<double>(dbias);
  }
  grads.attention = g;
  if (g.heads > 0 && (g.tq > 0 || units > 0)) {
    const int64_t bytes = VLMK_CALL(attention_backward_scratch, grads);
    for_tasks(heads * grads.chunks, bytes + 64, [&](int64_t task, Scratch& scratch) {
      const int64_t head = task / grads.chunks;
      VLMK_CALL(attention_backward, grads, head / g.kv_heads, head % g.kv_heads, task % grads.chunks,
                scratch.take<char>(bytes));
    });
    const int64_t size = g.dh * kQueryBlock;
    for_tasks(split ? g.batch * g.heads * blocks : 0, 2 * size * sizeof(A) + 64, [&](int64_t task, Scratch& scratch) {
      const int64_t head = task / blocks;
      VLMK_CALL(attention_join_query, grads, head / g.heads, head % g.heads, task % blocks, scratch.take<A>(2 * size));
    });
  }
  if (needs.bias) {
    result.dbias = at::zeros({dbias.size(1), dbias.size(2), dbias.size(3)}, dbias.options());
    for (int64_t part = 0; part < dbias.size(0); ++part) result.dbias.add_(dbias[part]);
  }
  return result;
}

}  // namespace vlmk
