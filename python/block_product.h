#pragma once
// Products in blocks of rows and columns: their operands, and how they are split into tasks.
#include "pairs.h"
#include "vlmkernels/block_product.h"

namespace vlmk {

using at::Tensor;

// Rows of which dout^T and h are packed at a time, and columns of a task.
constexpr int64_t kChunkRows = 2048, kTaskCols = 512;
// Up to so many rows the weight is read as it is where it can be: packing would cost more than it saves.
constexpr int64_t kFewRows = 128;

template <class P>
int64_t depth_of(int64_t d) {
  return sizeof(P) == 2 ? ceil_div(d, 32) * 32 : d;
}

constexpr int64_t round_up(int64_t count, int64_t to) { return ceil_div(count, to) * to; }

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
    return kBlockRows<P> * (std::max(kTaskCols, width) * sizeof(acc_t<P>) + (kPart + 32) * sizeof(P)) + 128;
  }
  // The product of a task, without its operands.
  BlockProduct<P> take(int64_t task, int64_t rows, int64_t depth, int64_t width, Scratch& scratch) const {
    BlockProduct<P> p{tile_product<P>(), nullptr,    nullptr, rows,   depth, width, depth, kPart, width,
                      first(task),       last(task), nullptr, nullptr};
    p.tiles = scratch.take<acc_t<P>>((depth > kPart ? p.last - p.first : 1) * rows * width);
    if (sizeof(P) == 2) p.part = scratch.take<P>(rows * (kPart + 32));
    return p;
  }
  int64_t rows, block, col_blocks, row_blocks, most, groups;
};

}  // namespace vlmk
