#pragma once
// Products in blocks of rows and columns, and those of dense layers, forward and backward.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/narrow.h>
#include <ATen/ops/zeros.h>

#include <optional>

#include "bridge.h"
#include "vlmkernels/dense.h"

namespace vlmk {

using at::Tensor;
using std::optional;

// Rows of which dout^T and h are packed at a time, and columns of a task.
constexpr int64_t kChunkRows = 2048, kTaskCols = 512;
// Up to so many rows the weight is read as it is where it can be: packing would cost more than it saves.
constexpr int64_t kFewRows = 128;

// The rows of a matrix that the mask keeps, as operands of products.
template <class P>
struct Operand {
  Operand(const Tensor& x, int64_t d, int64_t depth, const int64_t* index)
      : tensor(x.contiguous()),
        d(d),
        depth(depth),
        index(index),
        direct(!index && depth == d && x.scalar_type() == scalar_type<P>()) {}
  // [rows, depth], of which the first `count` hold rows from `first` on and the others 0: the matrix itself where it serves.
  const P* rows(int64_t first, int64_t count, int64_t rows, Scratch& scratch) const {
    if (direct && rows == count) return data<P>(tensor) + first * d;
    P* out = scratch.take<P>(rows * depth);
    with_storage(tensor.scalar_type(), [&](auto type) {
      using S = decltype(type);
      VLMK_CALL(load_rows, data<S>(tensor) + (index ? 0 : first * d), index ? index + first : nullptr, count, d, rows, depth,
                out);
    });
    return out;
  }
  // Scratch memory that rows() may take.
  int64_t bytes(int64_t rows) const { return rows * depth * int64_t(sizeof(P)) + 64; }

  Tensor tensor;
  int64_t d, depth;
  const int64_t* index;
  bool direct;
};

// How a product is split into tasks: blocks of rows, and groups of column blocks. No number depends on it.
template <class P>
struct Split {
  Split(int64_t rows, int64_t cols, int64_t width, int64_t block = kBlockRows<P>)
      : rows(rows),
        block(block),
        col_blocks(ceil_div(cols, width)),
        row_blocks(ceil_div(rows, block)),
        most(std::max<int64_t>(1, kTaskCols / width)) {
    const int64_t wanted = ceil_div(4 * at::get_num_threads(), row_blocks);
    groups = std::min(col_blocks, std::max(wanted, ceil_div(col_blocks, most)));
  }
  int64_t tasks() const { return row_blocks * groups; }
  int64_t row(int64_t task) const { return task / groups * block; }
  int64_t count(int64_t task) const { return std::min(block, rows - row(task)); }
  int64_t first(int64_t task) const { return task % groups * col_blocks / groups; }
  int64_t last(int64_t task) const { return (task % groups + 1) * col_blocks / groups; }
  // Scratch memory of take().
  static int64_t bytes(int64_t width) {
    return kBlockRows<P> * (std::max(kTaskCols, width) * sizeof(acc_t<P>) + kPartStride * sizeof(P)) + 128;
  }
  // The product of a task, without its operands.
  BlockProduct<P> take(int64_t task, int64_t rows, int64_t depth, int64_t width, Scratch& scratch) const {
    BlockProduct<P> p{tile_product<P>(), nullptr, nullptr,     rows,       depth,   width,  depth,
                      kBlockDepth,       width,   first(task), last(task), nullptr, nullptr};
    p.tiles = scratch.take<acc_t<P>>((depth > kBlockDepth ? p.last - p.first : 1) * rows * width);
    if (sizeof(P) == 2) p.part = scratch.take<P>(rows * kPartStride);
    return p;
  }
  int64_t rows, block, col_blocks, row_blocks, most, groups;
};

// Hidden layers that nobody keeps exist for so many rows at a time.
constexpr int64_t kHiddenRows = 2048;

// Which products torch computes itself: chosen when the library is imported, for matrices of one dtype. `few`: all three for
// up to kFewRows rows, where the tiles pack as much as they multiply.
struct TorchProducts {
  bool forward = false, input = false, weight = false, few = false;
};
TorchProducts& torch_products(at::ScalarType dtype);
inline bool torch_computes(bool TorchProducts::*product, at::ScalarType dtype, int64_t rows) {
  const TorchProducts& by_torch = torch_products(dtype);
  return rows <= kFewRows ? by_torch.few : by_torch.*product;
}

// The weight [outputs, inputs] and the bias of a layer that so many rows go through.
void need_layer(const Need& need, int64_t rows, const char* name, const Tensor& weight, at::IntArrayRef sizes, DTypes types,
                const char* bias_name, const optional<Tensor>& bias);

Activation activation_of(const Need& need, std::string_view name);
// An unwritten result with the rows of x and `size` columns.
Tensor with_last(const Tensor& x, int64_t size, at::ScalarType dtype);

inline Stored stored(const Tensor& t) {
  if (!t.defined() || t.numel() == 0) return {nullptr, Storage::f32};
  switch (t.scalar_type()) {
    case at::kDouble:
      return {t.data_ptr(), Storage::f64};
    case at::kFloat:
      return {t.data_ptr(), Storage::f32};
    case at::kBFloat16:
      return {t.data_ptr(), Storage::bf16};
    case at::kHalf:
      return {t.data_ptr(), Storage::f16};
    default:
      no_kernel(t.scalar_type());
  }
}
inline Stored stored(const optional<Tensor>& t) { return t ? stored(*t) : Stored{nullptr, Storage::f32}; }

// A result of `rows` rows, or of size 0 where nobody needs it.
inline Tensor result(bool needed, at::IntArrayRef sizes, const Tensor& like) {
  return on_huge_pages(at::empty(needed ? sizes : at::IntArrayRef{0}, like.options()));
}

// The weight [o, k], its rows times t [o] where that is given, as B operand of the product with itself.
template <class P>
Tensor pack_columns(const Tensor& weight, const acc_t<P>* t) {
  constexpr int64_t width = kBlockCols<P>;
  const int64_t o = weight.size(0), k = weight.size(1), depth = depth_of<P>(o), blocks = ceil_div(k, width);
  const Tensor packed = on_huge_pages(at::empty({blocks * depth * width}, weight.options()));
  for_tasks(blocks, 0, [&](int64_t block, Scratch&) {
    const int64_t k0 = block * width;
    VLMK_CALL(pack_columns_b, data<P>(weight) + k0, k, t, std::min(width, k - k0), o, depth, data<P>(packed) + k0 * depth);
  });
  return packed;
}

// What follows the product [rows, o], which is in memory.
template <class P>
void finish_rows(const Tensor& product, const LinearOutput<P>& f) {
  at::parallel_for(0, product.size(0), 16,
                   [&](int64_t begin, int64_t end) { VLMK_CALL(linear_finish, f, stored(product), begin, end - begin); });
}

// A matrix [rows, cols] that torch's products can write to.
inline Tensor view_of(const Stored& m, int64_t rows, int64_t cols, const Tensor& like) {
  return at::from_blob(m.data, {rows, cols}, like.options());
}
inline bool same_type(const Stored& m, const Tensor& t) { return m.type == stored(t).type; }

// A weight [o, k] as operand of products with its transpose in tiles, for some number of rows, which decides whether it is
// packed. One that is not is widened block by block where it must be: the whole in float would be written to memory.
template <class P>
class ForwardTiles {
 public:
  ForwardTiles(const Tensor& weight, int64_t rows) : weight_(weight.contiguous()), o_(weight.size(0)), k_(weight.size(1)) {
    // For few rows packing x and turning the tiles costs less than packing the weight.
    if (rows * (o_ + k_) >= o_ * k_) packed_ = pack_transposed<P>(weight_.to(scalar_type<P>()), kBlockCols<P>);
  }
  // f of the product x weight^T of `rows` rows of x [*, k], those that f.index lists or the first.
  void apply(const Tensor& x_, int64_t rows, const LinearOutput<P>& f) const {
    const Operand<P> x(x_, k_, depth_of<P>(k_), f.index);
    if (packed_.defined()) return many(x, rows, f);
    rows == 1 && sizeof(P) > 2 ? one(x, f) : few(x, rows, f);
  }

 private:
  void many(const Operand<P>& x, int64_t rows, const LinearOutput<P>& f) const {
    constexpr int64_t width = kBlockCols<P>;
    const Split<P> split(rows, o_, width);
    for_tasks(split.tasks(), x.bytes(kBlockRows<P>) + split.bytes(width), [&](int64_t task, Scratch& scratch) {
      const int64_t row = split.row(task), count = split.count(task), padded = whole_units(count);
      auto p = split.take(task, padded, x.depth, width, scratch);
      p.a = x.rows(row, count, padded, scratch), p.b = data<P>(packed_);
      VLMK_CALL(linear, p, f, row, count);
    });
  }

  void one(const Operand<P>& x, const LinearOutput<P>& f) const {
    const Memory memory = memory_of(x.bytes(1));
    Scratch scratch{memory.get()};
    const P* row = x.rows(0, 1, 1, scratch);
    const Operand<P> w(weight_, k_, k_, nullptr);
    at::parallel_for(0, o_, std::max<int64_t>(64, (1 << 17) / k_), [&](int64_t begin, int64_t end) {
      const int64_t step = w.direct ? end - begin : kWidened;
      const Memory block = memory_of(w.direct ? 0 : w.bytes(step));
      for (int64_t o0 = begin; o0 < end; o0 += step) {
        const int64_t count = std::min(step, end - o0);
        Scratch space{block.get()};
        VLMK_CALL(linear_row, f, row, w.rows(o0, count, count, space), k_, o0, count);
      }
    });
  }

  void few(const Operand<P>& x, int64_t rows, const LinearOutput<P>& f) const {
    using A = acc_t<P>;
    const int64_t width = std::min<int64_t>(64, round_up(rows, 16)), blocks = ceil_div(rows, width), depth = x.depth;
    const Operand<P> w(weight_, k_, depth, nullptr);
    const Tensor xt = at::empty({blocks * depth * width}, weight_.options().dtype(scalar_type<P>()));
    for_tasks(blocks, x.bytes(width), [&](int64_t block, Scratch& scratch) {
      const int64_t row = block * width, count = std::min(width, rows - row);
      VLMK_CALL(pack_transposed_b, x.rows(row, count, count, scratch), depth, count, depth, depth, width,
                data<P>(xt) + row * depth);
    });
    const Split<P> split(o_, rows, width, kFewOutputs);
    const int64_t bytes = w.bytes(kBlockRows<P>) + split.bytes(width) + kBlockRows<P> * width * sizeof(A) + 64;
    for_tasks(split.tasks(), bytes, [&](int64_t task, Scratch& scratch) {
      const int64_t o0 = split.row(task), count = split.count(task);
      auto p = split.take(task, count, depth, width, scratch);
      p.a = w.rows(o0, count, count, scratch), p.b = data<P>(xt);
      VLMK_CALL(linear_few, p, f, o0, count, rows, scratch.take<A>(width * count));
    });
  }

  static constexpr int64_t kFewOutputs = 128;  // of a task with few rows: narrow layers have work for all threads
  static constexpr int64_t kWidened = 32;      // outputs whose weights are widened at a time for one row

  Tensor weight_, packed_;
  int64_t o_, k_;
};

// A weight [o, k] as operand of the forward product of some number of rows, by torch where it was chosen.
template <class P>
class ForwardWeight {
 public:
  ForwardWeight(const Tensor& weight, int64_t rows) : weight_(weight), o_(weight.size(0)), k_(weight.size(1)) {
    if (!torch_computes(&TorchProducts::forward, weight.scalar_type(), rows)) tiles_.emplace(weight, rows);
  }
  // out = act(x weight^T + bias) + residual for x [rows, k].
  void apply(const Tensor& x, const LinearOutput<P>& f) const {
    const int64_t rows = x.size(0);
    if (rows == 0 || o_ == 0) return;
    if (k_ == 0) return finish_rows<P>(at::zeros({rows, o_}, x.options()), f);
    tiles_ ? tiles_->apply(x, rows, f) : by_torch(x, rows, f);
  }

 private:
  void by_torch(const Tensor& x_, int64_t rows, const LinearOutput<P>& f) const {
    const Tensor x = x_.to(weight_.scalar_type());
    const bool plain = f.activation == Activation::none && !f.y.data && !f.residual.data && !f.gate.data;
    if (!plain || !same_type(f.out, weight_)) {
      if (!f.bias || weight_.element_size() > 2) return finish_rows<P>(at::mm(x, weight_.t()), f);
      LinearOutput<P> rest = f;  // torch rounds a product to 16 bits: its bias is added before that
      rest.bias = nullptr;
      return finish_rows<P>(at::addmm(bias_of(f), x, weight_.t()), rest);
    }
    Tensor out = view_of(f.out, rows, o_, weight_);
    f.bias ? at::addmm_out(out, bias_of(f), x, weight_.t()) : at::mm_out(out, x, weight_.t());
  }
  Tensor bias_of(const LinearOutput<P>& f) const {
    const auto sums = weight_.options().dtype(sum_type(weight_.scalar_type()));
    return at::from_blob(const_cast<acc_t<P>*>(f.bias), {o_}, sums).to(weight_.scalar_type());
  }

  Tensor weight_;
  int64_t o_, k_;
  optional<ForwardTiles<P>> tiles_;
};

// A weight [o, k], its rows times t [o] where that is given, as operand of the products in tiles that give gradients by the
// input of some number of rows.
template <class P>
class BackwardTiles {
 public:
  BackwardTiles(const Tensor& weight, int64_t rows, const acc_t<P>* t = nullptr)
      : weight_(weight.to(scalar_type<P>()).contiguous()),
        o_(weight.size(0)),
        k_(weight.size(1)),
        packed_(sizeof(P) == 2 || t || rows > kFewRows) {
    if (packed_) weight_ = pack_columns<P>(weight_, t);
  }
  // Calls finish(product, row, count) with each block of the product g weight, of `rows` rows of g [*, o]: those that `index`
  // lists, or the first.
  template <class Finish>
  void apply(const Tensor& g_, const int64_t* index, int64_t rows, Finish finish) const {
    constexpr int64_t width = kBlockCols<P>;
    const Operand<P> g(g_, o_, depth_of<P>(o_), index);
    const Split<P> split(rows, k_, width);
    for_tasks(split.tasks(), g.bytes(kBlockRows<P>) + split.bytes(width), [&](int64_t task, Scratch& scratch) {
      const int64_t row = split.row(task), count = split.count(task), padded = whole_units(count);
      auto p = split.take(task, padded, g.depth, width, scratch);
      p.a = g.rows(row, count, padded, scratch), p.b = data<P>(weight_);
      if (!packed_) p.ldb = k_;
      finish(p, row, count);
    });
  }

 private:
  Tensor weight_;
  int64_t o_, k_;
  bool packed_;
};

// A weight [o, k] as operand of the product that gives the gradient by the input of some number of rows, by torch where it was
// chosen.
template <class P>
class BackwardWeight {
 public:
  BackwardWeight(const Tensor& weight, int64_t rows) : weight_(weight), o_(weight.size(0)), k_(weight.size(1)) {
    if (!torch_computes(&TorchProducts::input, weight.scalar_type(), rows)) tiles_.emplace(weight, rows);
  }
  // dx = g weight, and what LinearInput adds, for g [rows, o].
  void apply(const Tensor& g, const LinearInput<P>& f) const {
    if (g.numel() == 0 || k_ == 0) return;
    if (!tiles_) return by_torch(g, f);
    tiles_->apply(g, nullptr, g.numel() / o_,
                  [&](const BlockProduct<P>& p, int64_t row, int64_t count) { VLMK_CALL(linear_dx, p, f, row, count); });
  }

 private:
  void by_torch(const Tensor& g_, const LinearInput<P>& f) const {
    const Tensor g = g_.to(weight_.scalar_type());
    if (!f.y.data && !f.plus.data && same_type(f.dx, weight_)) {
      Tensor dx = view_of(f.dx, g.size(0), k_, weight_);
      at::mm_out(dx, g, weight_);
      return;
    }
    const Tensor product = at::mm(g, weight_);
    at::parallel_for(0, product.size(0), 16,
                     [&](int64_t begin, int64_t end) { VLMK_CALL(linear_dx_finish, f, stored(product), begin, end - begin); });
  }

  Tensor weight_;
  int64_t o_, k_;
  optional<BackwardTiles<P>> tiles_;
};

// Products g^T x [o, k] in tiles, of so many rows in all.
template <class P>
class WeightTiles {
 public:
  WeightTiles(int64_t o, int64_t k, int64_t rows, at::TensorOptions options) : o_(o), k_(k), rows_(rows), split_(o, k, width) {
    options = options.dtype(scalar_type<P>());
    const int64_t most = std::min(kChunkRows, whole_units(rows));
    a_ = on_huge_pages(at::empty({round_up(most, std::min(kBlockDepth, most)) * o}, options));
    b_ = on_huge_pages(at::empty({most * split_.col_blocks * width}, options));
  }
  // Takes in `rows` rows of g [*, o] and x [*, k], those that `index` lists or the first, which follow those of earlier calls:
  // calls finish(product, o0, count, whether earlier rows are to be added, whether these are the last).
  template <class Finish>
  void add(const Tensor& g_, const Tensor& x_, const int64_t* index, int64_t rows, Finish finish) {
    const Operand<P> g(g_, o_, o_, index), x(x_, k_, k_, index);
    for (int64_t begin = 0; begin < rows; begin += kChunkRows) {
      const int64_t chunk = std::min(kChunkRows, rows - begin), depth = whole_units(chunk), step = std::min(kBlockDepth, depth);
      pack(g, x, begin, chunk);
      for_tasks(split_.tasks(), split_.bytes(width), [&](int64_t task, Scratch& scratch) {
        const int64_t o0 = split_.row(task), count = split_.count(task);
        auto p = split_.take(task, count, depth, width, scratch);
        p.a = data<P>(a_) + o0 * step, p.b = data<P>(b_);
        p.lda = step, p.a_step = step * o_, p.part = nullptr;
        finish(p, o0, count, done_ > 0, done_ + chunk == rows_);
      });
      done_ += chunk;
    }
  }
  int64_t col_blocks() const { return split_.col_blocks; }

 private:
  static constexpr int64_t width = kBlockCols<P>;

  // g^T as A operand and x as B operand.
  void pack(const Operand<P>& g, const Operand<P>& x, int64_t begin, int64_t chunk) {
    const int64_t depth = whole_units(chunk), step = std::min(kBlockDepth, depth);
    for_tasks(2 * ceil_div(chunk, step), std::max(g.bytes(step), x.bytes(step)), [&](int64_t task, Scratch& scratch) {
      const int64_t first = task / 2 * step, count = std::min(step, chunk - first);
      if (task % 2) {
        VLMK_CALL(pack_transposed_a, g.rows(begin + first, count, count, scratch), o_, count, o_, step,
                  data<P>(a_) + first * o_);
        return;
      }
      const P* from = x.rows(begin + first, count, count, scratch);
      for (int64_t k0 = 0; k0 < k_; k0 += width) {
        VLMK_CALL(pack_columns_b, from + k0, k_, static_cast<const acc_t<P>*>(nullptr), std::min(width, k_ - k0), count,
                  std::min(step, depth - first), data<P>(b_) + k0 * depth + first * width);
      }
    });
  }

  Tensor a_, b_;
  int64_t o_, k_, rows_, done_ = 0;
  Split<P> split_;
};

// dweight = g^T x [o, k], whose rows come in parts, by torch where it was chosen.
template <class P>
class WeightGradient {
 public:
  using A = acc_t<P>;
  WeightGradient(const Tensor& dweight, int64_t rows) : dweight_(dweight), rows_(rows) {
    if (torch_computes(&TorchProducts::weight, dweight.scalar_type(), rows)) return;
    tiles_.emplace(dweight.size(0), dweight.size(1), rows, dweight.options());
    const auto sum = sum_type(scalar_type<P>());
    if (rows > kChunkRows) {
      sums_ = dweight.scalar_type() == sum ? dweight : on_huge_pages(at::empty(dweight.sizes(), dweight.options().dtype(sum)));
    }
  }
  // Adds g^T x of rows that follow those of earlier calls, g [rows, o] and x [rows, k].
  void add(const Tensor& g, const Tensor& x) {
    const int64_t o = dweight_.size(0), k = dweight_.size(1);
    if (g.numel() == 0 || k == 0) return;
    if (!tiles_) return by_torch(g, x);
    const LinearWeight<P> f{k, data<A>(sums_), stored(dweight_)};
    tiles_->add(g, x, nullptr, g.numel() / o, [&](const BlockProduct<P>& p, int64_t o0, int64_t count, bool add, bool finish) {
      VLMK_CALL(linear_dw, p, f, o0, count, add, finish);
    });
  }

 private:
  void by_torch(const Tensor& g, const Tensor& x) {
    const auto dtype = dweight_.scalar_type();
    const bool whole = g.size(0) == rows_, first = done_ == 0;
    done_ += g.size(0);
    if (whole) {
      Tensor out = dweight_;
      at::mm_out(out, g.to(dtype).t(), x.to(dtype));
      return;
    }
    const Tensor product = at::mm(g.to(dtype).t(), x.to(dtype)).to(sum_type(dtype));
    sums_ = first ? product : sums_.add_(product);
    if (done_ == rows_) dweight_.copy_(sums_);
  }

  Tensor dweight_, sums_;
  int64_t rows_, done_ = 0;
  optional<WeightTiles<P>> tiles_;
};

// A bias as the kernels read it; undefined where there is none.
template <class P>
Tensor widened(const optional<Tensor>& bias) {
  return bias ? bias->to(sum_type(scalar_type<P>())).contiguous() : Tensor();
}

inline int64_t rows_of(const Tensor& x) { return c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)); }

// Memory of operands, [rows, cols].
template <class P>
Tensor buffer(int64_t rows, int64_t cols, const Tensor& like) {
  return on_huge_pages(at::empty({rows, cols}, like.options().dtype(scalar_type<P>())));
}

// Rows [begin, begin + count) of x [rows, cols], which may have no columns. What nobody needs, undefined or [0], stays so.
inline Tensor part(const Tensor& x, int64_t begin, int64_t count) {
  return x.defined() && x.dim() == 2 ? x.narrow(0, begin, count) : x;
}

// g = dout * act'(y) where `g` is defined, and dbias where it is not empty: the sums of its columns.
template <class A>
void linear_slopes(int64_t o, Activation activation, const Tensor& dout, const Tensor& y, const Tensor& g,
                   const Tensor& dbias) {
  constexpr int64_t kRows = 128;
  const int64_t rows = dout.numel() / o, blocks = ceil_div(rows, kRows);
  const bool summed = dbias.defined() && dbias.numel() > 0;
  const Tensor sums = at::empty({summed ? blocks : 0, o}, dout.options().dtype(at::kDouble));
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      VLMK_CALL(linear_slope<A>, o, activation, stored(dout), stored(y), stored(g),
                summed ? data<double>(sums) + block * o : nullptr, block * kRows, std::min(kRows, rows - block * kRows));
    }
  });
  if (!summed) return;
  double* total = data<double>(sums);  // the first block's become those of all, in block order
  for (int64_t block = 1; block < blocks; ++block) {
    for (int64_t c = 0; c < o; ++c) total[c] += total[block * o + c];
  }
  dbias.copy_(sums[0]);
}

// dbias = the sums of the columns of matrices that come one after the other.
template <class A>
class ColumnSums {
 public:
  explicit ColumnSums(const Tensor& dbias)
      : dbias_(dbias), total_(at::zeros(dbias.sizes(), dbias.options().dtype(at::kDouble))) {}
  void add(const Tensor& g) {
    const Tensor sum = at::empty_like(total_);
    linear_slopes<A>(dbias_.numel(), Activation::none, g, {}, {}, sum);
    total_.add_(sum);
    dbias_.copy_(total_);
  }

 private:
  Tensor dbias_, total_;
};

}  // namespace vlmk
