// vlmkernels::relative_similarity for CPU tensors (contract: vlmkernels/ops/relative_similarity.py).
#include "vlmkernels/relative_similarity.h"

#include <torch/library.h>

#include <mutex>
#include <vector>

#include "bridge.h"

namespace vlmk {
namespace {

using at::Tensor;

constexpr int64_t kMostColumns = int64_t(1) << 26;  // of a table, which has 4 bytes for each
constexpr int64_t kFilling = 8;                     // reads of a table for each value that fills it
constexpr int64_t kTaskProducts = 1 << 12;          // of rows that are merged

// Values and indices of one side.
struct Side {
  Side(const Need& need, const char* name_of_values, const Tensor& values_, const char* name_of_indices, const Tensor& indices_)
      : values(values_), indices(indices_) {
    need.tensor(name_of_values, values, {kAny, kAny}, kFloats);
    need.tensor(name_of_indices, indices, values.sizes(), at::kLong);
    need.countable(values.sizes());
    rows = values.size(0), k = values.size(1);
    indices = indices.contiguous();
    need.that(ordered(), name_of_indices, " must ascend in each row, from 0 on");
  }

  template <class T>
  SparseRows<T> from(int64_t row) const {
    return {data<T>(values) + row * k, data<int64_t>(indices) + row * k, k};
  }
  // Above every index.
  int64_t columns() const {
    int64_t most = -1;
    for (int64_t i = 0; k > 0 && i < rows; ++i) most = std::max(most, data<int64_t>(indices)[(i + 1) * k - 1]);
    return most == INT64_MAX ? most : most + 1;
  }

  Tensor values, indices;
  int64_t rows, k;

 private:
  bool ordered() const {
    constexpr int64_t part = 1 << 16;
    const int64_t block = std::max<int64_t>(part / std::max<int64_t>(k, 1), 1);
    std::atomic<bool> holds{true};
    for_tasks(k ? ceil_div(rows, block) : 0, 0, [&](int64_t task, Scratch&) {
      const int64_t first = task * block, count = std::min(block, rows - first);
      if (!VLMK_CALL(ascending, data<int64_t>(indices) + first * k, count, k)) holds = false;
    });
    return holds;
  }
};

// Memory of tables' places: 0 when taken and when given back. The system gives pages of zeros where they are touched.
class Places {
 public:
  explicit Places(int64_t count) : count_(count) {}
  int32_t* take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) {
      all_.emplace_back(static_cast<int32_t*>(std::calloc(count_, sizeof(int32_t))), std::free);
      if (!all_.back()) throw std::bad_alloc();
      free_.push_back(all_.back().get());
    }
    int32_t* place = free_.back();
    free_.pop_back();
    return place;
  }
  void give(int32_t* place) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(place);
  }

 private:
  const int64_t count_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<int32_t, void (*)(void*)>> all_;
  std::vector<int32_t*> free_;
};

// out [n, m], by tables of one side's rows that the other side's rows read.
template <class T>
void by_tables(const Side& tables, const Side& readers, int64_t columns, acc_t<T>* out, int64_t of_table, int64_t of_row) {
  using A = acc_t<T>;
  const int64_t filled = std::min(kTableRows, tables.rows) * tables.k;
  const int64_t block = std::max<int64_t>(kFilling * filled / readers.k, 64);
  const int64_t blocks = ceil_div(readers.rows, block), bytes = (filled + 1) * kTableRows * sizeof(A);
  Places places(columns + 1);
  for_tasks(ceil_div(tables.rows, kTableRows) * blocks, bytes, [&](int64_t task, Scratch& scratch) {
    const int64_t row = task / blocks * kTableRows, first = task % blocks * block;
    int32_t* place = places.take();
    const SparseTable<T> table{tables.from<T>(row), std::min(kTableRows, tables.rows - row), columns, place,
                               scratch.take<A>((filled + 1) * kTableRows)};
    VLMK_CALL(relative_similarity, table, readers.from<T>(first), std::min(block, readers.rows - first),
              out + row * of_table + first * of_row, of_table, of_row);
    places.give(place);
  });
}

template <class T>
void by_merging(const Side& images, const Side& texts, acc_t<T>* out) {
  const int64_t most = std::max<int64_t>(kTaskProducts / std::max<int64_t>(texts.rows, 1), 1);
  for_tasks(ceil_div(images.rows, most), 0, [&](int64_t task, Scratch&) {
    const int64_t first = task * most;
    VLMK_CALL(relative_similarity_merged, images.from<T>(first), std::min(most, images.rows - first), texts.from<T>(0),
              texts.rows, out + first * texts.rows);
  });
}

Tensor relative_similarity(const Tensor& image_values, const Tensor& image_indices, const Tensor& text_values,
                           const Tensor& text_indices) {
  const Need need("relative_similarity");
  Side images(need, "image_values", image_values, "image_indices", image_indices);
  Side texts(need, "text_values", text_values, "text_indices", text_indices);
  const at::ScalarType dtype = c10::promoteTypes(image_values.scalar_type(), text_values.scalar_type());
  for (Side* side : {&images, &texts}) side->values = side->values.to(dtype).contiguous();
  const int64_t n = images.rows, m = texts.rows;
  need.countable({n, m});
  const Tensor out = on_huge_pages(at::empty({n, m}, image_values.options().dtype(sum_type(dtype))));
  if (out.numel() == 0) return out;
  // Reads of a table, for either side as the one in tables
  const int64_t of_images = ceil_div(n, kTableRows) * m * texts.k, of_texts = ceil_div(m, kTableRows) * n * images.k;
  const bool images_in_tables = of_images <= of_texts;
  const int64_t columns = (images_in_tables ? images : texts).columns();
  with_storage(dtype, [&](auto type) {
    using T = decltype(type);
    acc_t<T>* result = data<acc_t<T>>(out);
    if (images.k == 0 || texts.k == 0 || columns > kMostColumns) {
      by_merging<T>(images, texts, result);
    } else if (images_in_tables) {
      by_tables<T>(images, texts, columns, result, m, 1);
    } else {
      by_tables<T>(texts, images, columns, result, 1, m);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) { m.impl("relative_similarity", &relative_similarity); }

}  // namespace vlmk
