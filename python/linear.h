#pragma once
// The products of dense layers, forward and backward, on the blocks of block_product.h.
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <optional>

#include "block_product.h"
#include "vlmkernels/linear.h"

namespace vlmk {

using std::optional;

Activation activation_of(std::string_view name);

inline Stored stored(const Tensor& t) {
  if (!t.defined() || t.numel() == 0) return {nullptr, Storage::f32};
  const auto type = t.scalar_type();
  return {t.data_ptr(), type == at::kDouble     ? Storage::f64
                        : type == at::kFloat    ? Storage::f32
                        : type == at::kBFloat16 ? Storage::bf16
                                                : Storage::f16};
}
inline Stored stored(const optional<Tensor>& t) { return t ? stored(*t) : Stored{nullptr, Storage::f32}; }

// A result of `rows` rows, or of size 0 where nobody needs it.
inline Tensor result(bool needed, at::IntArrayRef sizes, const Tensor& like) {
  return on_huge_pages(at::empty(needed ? sizes : at::IntArrayRef{0}, like.options()));
}

// The weight [o, k] as B operand of the product with its transpose.
template <class P>
Tensor pack_transposed(const Tensor& weight) {
  constexpr int64_t width = kBlockCols<P>;
  const int64_t o = weight.size(0), k = weight.size(1), depth = depth_of<P>(k), blocks = ceil_div(o, width);
  const Tensor packed = on_huge_pages(at::empty({blocks * depth * width}, weight.options()));
  for_tasks(blocks, 0, [&](int64_t block, Scratch&) {
    const int64_t o0 = block * width;
    VLMK_CALL(pack_transposed_b, data<P>(weight) + o0 * k, k, std::min(width, o - o0), k, depth, width,
              data<P>(packed) + o0 * depth);
  });
  return packed;
}

// The weight [o, k] as B operand of the product with itself.
template <class P>
Tensor pack_columns(const Tensor& weight) {
  constexpr int64_t width = kBlockCols<P>;
  const int64_t o = weight.size(0), k = weight.size(1), depth = depth_of<P>(o), blocks = ceil_div(k, width);
  const Tensor packed = on_huge_pages(at::empty({blocks * depth * width}, weight.options()));
  for_tasks(blocks, 0, [&](int64_t block, Scratch&) {
    const int64_t k0 = block * width;
    VLMK_CALL(pack_columns_b, data<P>(weight) + k0, k, static_cast<const acc_t<P>*>(nullptr), std::min(width, k - k0), o, depth,
              data<P>(packed) + k0 * depth);
  });
  return packed;
}

// out = act(x weight^T + bias) + residual for x [rows, k] and a weight that pack_transposed gave.
template <class P>
void packed_linear(const Tensor& x_, int64_t k, const Tensor& packed, const LinearOutput<P>& f) {
  constexpr int64_t width = kBlockCols<P>;
  const int64_t rows = x_.numel() / k, depth = depth_of<P>(k);
  const Operand<P> x(x_, k, depth, nullptr);
  const Split<P> split(rows, f.o, width);
  for_tasks(split.tasks(), x.bytes(kBlockRows<P>) + split.bytes(width), [&](int64_t task, Scratch& scratch) {
    const int64_t row = split.row(task), count = split.count(task), padded = round_up(count, 32);
    auto p = split.take(task, padded, depth, width, scratch);
    p.a = x.rows(row, count, padded, scratch), p.b = data<P>(packed);
    VLMK_CALL(linear, p, f, row, count);
  });
}

// The same for a weight [o, k] as it is, which few rows do not pack. Nothing is empty.
template <class P>
void linear_forward(const Tensor& x_, const Tensor& weight_, const LinearOutput<P>& f) {
  using A = acc_t<P>;
  const Tensor weight = weight_.to(scalar_type<P>()).contiguous();
  const int64_t o = weight.size(0), k = weight.size(1), depth = depth_of<P>(k), rows = x_.numel() / k;
  if (rows * (o + k) >= o * k) return packed_linear<P>(x_, k, pack_transposed<P>(weight), f);
  const Operand<P> x(x_, k, depth, nullptr), w(weight, k, depth, nullptr);
  if (rows == 1 && sizeof(P) > 2) {
    Scratch scratch(x.bytes(1));
    const P* row = x.rows(0, 1, 1, scratch);
    at::parallel_for(0, o, std::max<int64_t>(64, (1 << 17) / k), [&](int64_t begin, int64_t end) {
      VLMK_CALL(linear_row, f, row, data<P>(weight) + begin * k, k, begin, end - begin);
    });
    return;
  }
  // Packing x and turning the tiles costs less than packing the weight.
  const int64_t width = std::min<int64_t>(64, round_up(rows, 16)), blocks = ceil_div(rows, width);
  const Tensor xt = at::empty({blocks * depth * width}, weight.options());
  for_tasks(blocks, x.bytes(width), [&](int64_t block, Scratch& scratch) {
    const int64_t row = block * width, count = std::min(width, rows - row);
    VLMK_CALL(pack_transposed_b, x.rows(row, count, count, scratch), depth, count, depth, depth, width,
              data<P>(xt) + row * depth);
  });
  const Split<P> split(o, rows, width);
  const int64_t bytes = w.bytes(kBlockRows<P>) + split.bytes(width) + kBlockRows<P> * width * sizeof(A) + 64;
  for_tasks(split.tasks(), bytes, [&](int64_t task, Scratch& scratch) {
    const int64_t o0 = split.row(task), count = split.count(task);
    auto p = split.take(task, count, depth, width, scratch);
    p.a = w.rows(o0, count, count, scratch), p.b = data<P>(xt);
    VLMK_CALL(linear_few, p, f, o0, count, rows, scratch.take<A>(width * count));
  });
}

// dx = g weight, and what LinearInput adds, for g [rows, o]. Nothing is empty.
template <class P>
void linear_input_gradient(const Tensor& g_, const Tensor& weight_, const LinearInput<P>& f) {
  constexpr int64_t width = kBlockCols<P>;
  const Tensor weight = weight_.to(scalar_type<P>()).contiguous();
  const int64_t o = weight.size(0), k = weight.size(1), depth = depth_of<P>(o), rows = g_.numel() / o;
  const Operand<P> g(g_, o, depth, nullptr);
  const Split<P> split(rows, k, width);
  const bool packed = sizeof(P) == 2 || rows > kFewRows;
  const Tensor w = packed ? pack_columns<P>(weight) : weight;
  for_tasks(split.tasks(), g.bytes(kBlockRows<P>) + split.bytes(width), [&](int64_t task, Scratch& scratch) {
    const int64_t row = split.row(task), count = split.count(task), padded = round_up(count, 32);
    auto p = split.take(task, padded, depth, width, scratch);
    p.a = g.rows(row, count, padded, scratch), p.b = data<P>(w);
    if (!packed) p.ldb = k;
    VLMK_CALL(linear_dx, p, f, row, count);
  });
}

// dweight = g^T x [o, k], whose rows come in parts.
template <class P>
class WeightGradient {
 public:
  using A = acc_t<P>;
  WeightGradient(const Tensor& dweight, int64_t rows) : dweight_(dweight), rows_(rows), split_(o(), k(), width) {
    const auto options = dweight.options().dtype(scalar_type<P>());
    const int64_t most = std::min(kChunkRows, round_up(rows, 32));
    a_ = on_huge_pages(at::empty({round_up(most, std::min(kPart, most)) * o()}, options));
    b_ = on_huge_pages(at::empty({most * split_.col_blocks * width}, options));
    const auto sum = sum_type(scalar_type<P>());
    if (rows > kChunkRows) {
      sums_ = dweight.scalar_type() == sum ? dweight : on_huge_pages(at::empty(dweight.sizes(), options.dtype(sum)));
    }
  }
  // Adds g^T x of rows that follow those of earlier calls, g [rows, o] and x [rows, k].
  void add(const Tensor& g_, const Tensor& x_) {
    const Operand<P> g(g_, o(), o(), nullptr), x(x_, k(), k(), nullptr);
    const LinearWeight<P> f{k(), sums_.defined() ? data<A>(sums_) : nullptr, stored(dweight_)};
    const int64_t rows = g_.numel() / o();
    for (int64_t begin = 0; begin < rows; begin += kChunkRows) {
      const int64_t chunk = std::min(kChunkRows, rows - begin), depth = round_up(chunk, 32), step = std::min(kPart, depth);
      pack(g, x, begin, chunk);
      for_tasks(split_.tasks(), split_.bytes(width), [&](int64_t task, Scratch& scratch) {
        auto p = split_.take(task, split_.count(task), depth, width, scratch);
        p.a = data<P>(a_) + split_.row(task) * step, p.b = data<P>(b_);
        p.lda = step, p.a_step = step * o(), p.part = nullptr;
        VLMK_CALL(linear_dw, p, f, split_.row(task), split_.count(task), done_ > 0, done_ + chunk == rows_);
      });
      done_ += chunk;
    }
  }

 private:
  static constexpr int64_t width = kBlockCols<P>;
  int64_t o() const { return dweight_.size(0); }
  int64_t k() const { return dweight_.size(1); }

  // g^T as A operand and x as B operand.
  void pack(const Operand<P>& g, const Operand<P>& x, int64_t begin, int64_t chunk) {
    const int64_t depth = round_up(chunk, 32), step = std::min(kPart, depth);
    for_tasks(2 * ceil_div(chunk, step), std::max(g.bytes(step), x.bytes(step)), [&](int64_t task, Scratch& scratch) {
      const int64_t at = task / 2 * step, count = std::min(step, chunk - at);
      if (task % 2) {
        VLMK_CALL(pack_transposed_a, g.rows(begin + at, count, count, scratch), o(), count, o(), step, data<P>(a_) + at * o());
        return;
      }
      const P* from = x.rows(begin + at, count, count, scratch);
      for (int64_t k0 = 0; k0 < k(); k0 += width) {
        VLMK_CALL(pack_columns_b, from + k0, k(), static_cast<const A*>(nullptr), std::min(width, k() - k0), count,
                  std::min(step, depth - at), data<P>(b_) + k0 * depth + at * width);
      }
    });
  }

  Tensor dweight_, a_, b_, sums_;
  int64_t rows_, done_ = 0;
  Split<P> split_;
};

// g = dout * act'(y) where `g` is defined, and dbias where it is not empty: the sums of its columns.
template <class A>
void linear_slopes(int64_t o, Activation activation, const Tensor& dout, const Tensor& y, const Tensor& g,
                   const Tensor& dbias) {
  constexpr int64_t kRows = 128;
  const int64_t rows = dout.numel() / o, blocks = ceil_div(rows, kRows);
  const bool summed = dbias.numel() > 0;
  const Tensor sums = at::empty({summed ? blocks : 0, o}, dout.options().dtype(sum_type(scalar_type<A>())));
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      VLMK_CALL(linear_slope, o, activation, stored(dout), stored(y), stored(g), summed ? data<A>(sums) + block * o : nullptr,
                block * kRows, std::min(kRows, rows - block * kRows));
    }
  });
  if (summed) dbias.copy_(sums.sum(0, false, at::kDouble));
}

}  // namespace vlmk
