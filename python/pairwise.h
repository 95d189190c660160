#pragma once
// Operands of the pairwise kernels: contiguous features and their packed copies, and how the walk is split.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>

#include "bridge.h"
#include "vlmkernels/pairwise.h"

namespace vlmk {

// query [n, d], key [m, d], the scale, and the inverse norms [n] and [m].
inline void need_features(const Need& need, const at::Tensor& query, const at::Tensor& key, const at::Tensor& scale,
                          const std::optional<at::Tensor>& a = {}, const std::optional<at::Tensor>& b = {}) {
  need.tensor("query", query, {kAny, kAny}, kFloats);
  const int64_t n = query.size(0), d = query.size(1);
  need.tensor("key", key, {kAny, d}, query.scalar_type());
  const int64_t m = key.size(0);
  need.that(d > 0, "query and key must have a width, got sizes ", query.sizes(), " and ", key.sizes());
  need.scalar("scale", scale);
  const auto sums = sum_type(query.scalar_type());
  need.tensor("query_inv_norm", a, n, sums);
  need.tensor("key_inv_norm", b, m, sums);
  need.countable({n, m});
  need.countable({std::max(n, m), d});
}

// The same of a teacher, of another width.
inline void need_teacher(const Need& need, const at::Tensor& query, const at::Tensor& key, const at::Tensor& teacher_query,
                         const at::Tensor& teacher_key, const at::Tensor& teacher_scale) {
  const int64_t n = query.size(0), m = key.size(0);
  need.tensor("teacher_query", teacher_query, {n, kAny}, query.scalar_type());
  const int64_t d = teacher_query.size(1);
  need.tensor("teacher_key", teacher_key, {m, d}, query.scalar_type());
  need.that(d > 0, "teacher_query and teacher_key must have a width, got sizes ", teacher_query.sizes(), " and ",
            teacher_key.sizes());
  need.scalar("teacher_scale", teacher_scale);
  need.countable({std::max(n, m), d});
}

// The features as kernels read them, owning the memory that Pairs points to.
template <class P>
struct Features {
  at::Tensor query, key;         // [n, d], [m, d] contiguous, in the operands' type
  at::Tensor padded, kt, k, qt;  // see Pairs
  at::Tensor a, b;
  Pairs<P> pairs;

  Features(const at::Tensor& q, const at::Tensor& k_, const at::Tensor& scale, const std::optional<at::Tensor>& a_,
           const std::optional<at::Tensor>& b_)
      : query(q.to(scalar_type<P>()).contiguous()), key(k_.to(scalar_type<P>()).contiguous()), padded(query) {
    pairs.n = query.size(0), pairs.m = key.size(0), pairs.d = query.size(1);
    pairs.depth = depth_of<P>(pairs.d);
    if (pairs.depth != pairs.d) padded = at::constant_pad_nd(query, {0, pairs.depth - pairs.d});
    pairs.q = data<P>(padded);
    pairs.scale = number<acc_t<P>>(scale);
    if (a_) a = a_->contiguous();
    if (b_) b = b_->contiguous();
    pairs.a = a.defined() ? data<acc_t<P>>(a) : nullptr;
    pairs.b = b.defined() ? data<acc_t<P>>(b) : nullptr;
    pairs.kt = pairs.k = pairs.qt = nullptr;
    pairs.qt_first = 0;
    pairs.product = tile_product<P>();
  }

  // K^T for the similarities.
  void pack_kt(int64_t width = kTileCols) {
    kt = pack_transposed<P>(key, width);
    pairs.kt = data<P>(kt);
  }

  // K for dq.
  void pack_k() {
    k = pack_rows<P>(key, kTileCols);
    pairs.k = data<P>(k);
  }

  // Q^T of row blocks [first, last) for dk.
  void pack_qt(int64_t first, int64_t last) {
    constexpr int64_t rows = kKeyTiles<P> * kTileRows;
    const int64_t groups = ceil_div(last - first, kKeyTiles<P>), size = groups * pairs.d * rows;
    if (!qt.defined() || qt.numel() < size) qt = on_huge_pages(at::empty({size}, query.options()));
    P* out = data<P>(qt);
    for_tasks(groups, 0, [&](int64_t group, Scratch&) {
      const int64_t i0 = first * kTileRows + group * rows, count = std::min(rows, pairs.n - i0);
      VLMK_CALL(pack_transposed_a, data<P>(query) + i0 * pairs.d, pairs.d, count, pairs.d, rows, out + group * pairs.d * rows);
    });
    pairs.qt = out;
    pairs.qt_first = first;
  }
};

// A gradient of x in its type; of size 0 where nobody needs it.
inline at::Tensor as_given(const at::Tensor& grad, const at::Tensor& x, bool need) {
  return need ? grad.to(x.scalar_type()) : at::empty({0}, x.options());
}

// Blocks per chunk of row or column sums: a fixed function of the shape, so that sums do not depend on the number of threads;
// at most `most` chunks, which bounds the partial sums.
inline int64_t chunk_of(int64_t blocks, int64_t most) {
  return std::max({int64_t(1), std::min<int64_t>(4, ceil_div(blocks, 8)), ceil_div(blocks, most)});
}

// How many tasks share the depth of one column block's gradient: more when there are few blocks, a fixed function of the shape.
inline int64_t depth_parts(int64_t col_blocks, int64_t d) {
  return std::max<int64_t>(1, std::min(ceil_div(8, std::max<int64_t>(1, col_blocks)), d / 64));
}

}  // namespace vlmk
