#include "vlmkernels/relative_similarity.h"

#include "registers.h"

namespace vlmk::VLMK_ISA {
namespace {

// One number for each row of a table.
template <class A>
struct Lanes {
  static constexpr int64_t lanes = Registers<A>::lanes, count = kTableRows / lanes;
  Register<A> part[count] = {};

  VLMK_INLINE void add(const A* from, A factor) {
    for (int64_t i = 0; i < count; ++i) part[i] += from_memory(from + i * lanes) * factor;
  }
  VLMK_INLINE void add_to(double* sums) const {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t lane = 0; lane < lanes; ++lane) sums[i * lanes + lane] += part[i][lane];
    }
  }
};

// 0, or NaN where a value is not finite: in a dense product it would meet a 0.
template <class T>
VLMK_INLINE acc_t<T> zero_of(const T* values, int64_t k) {
  acc_t<T> sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < k; ++c) sum += to_acc(values[c]) * 0;
  return sum;
}

// Gives each index of the rows its place, with the values of all rows.
template <class T>
void fill(const SparseTable<T>& table) {
  using A = acc_t<T>;
  const int64_t k = table.rows.k;
  int32_t used = 0;
  for (int64_t r = 0; r < kTableRows; ++r) table.values[r] = 0;
  for (int64_t r = 0; r < table.count; ++r) {
    for (int64_t c = r * k; c < (r + 1) * k; ++c) {
      int32_t& place = table.place[table.rows.indices[c]];
      if (place == 0) {
        place = ++used;
        for (int64_t other = 0; other < kTableRows; ++other) table.values[place * kTableRows + other] = A(0);
      }
      table.values[place * kTableRows + r] = to_acc(table.rows.values[c]);
    }
  }
}

template <class T>
void clear(const SparseTable<T>& table) {
  for (int64_t c = 0; c < table.count * table.rows.k; ++c) table.place[table.rows.indices[c]] = 0;
}

}  // namespace

bool ascending(const int64_t* indices, int64_t rows, int64_t k) {
  bool holds = true;
  for (int64_t i = 0; k > 0 && i < rows; ++i) {
    const int64_t* row = indices + i * k;
    int64_t falls = row[0] < 0;
#pragma omp simd reduction(+ : falls)
    for (int64_t c = 1; c < k; ++c) falls += row[c] <= row[c - 1];
    holds &= falls == 0;
  }
  return holds;
}

template <class T>
void relative_similarity(const SparseTable<T>& table, const SparseRows<T>& rows, int64_t count, acc_t<T>* out, int64_t of_table,
                         int64_t of_row) {
  using A = acc_t<T>;
  fill(table);
  double zeros[kTableRows] = {};
  for (int64_t r = 0; r < table.count; ++r) zeros[r] = zero_of(table.rows.values + r * table.rows.k, table.rows.k);
  for (int64_t i = 0; i < count; ++i) {
    const T* values = rows.values + i * rows.k;
    const int64_t* indices = rows.indices + i * rows.k;
    double sums[kTableRows];
    __builtin_memcpy(sums, zeros, sizeof(sums));
    for (int64_t c0 = 0; c0 < rows.k; c0 += kSumRows) {
      Lanes<A> part;
      for (int64_t c = c0; c < min_(c0 + kSumRows, rows.k); ++c) {
        const int64_t place = table.place[min_(indices[c], table.columns)];
        part.add(table.values + place * kTableRows, to_acc(values[c]));
      }
      part.add_to(sums);
    }
    for (int64_t r = 0; r < table.count; ++r) out[r * of_table + i * of_row] = static_cast<A>(sums[r]);
  }
  clear(table);
}

template <class T>
void relative_similarity_merged(const SparseRows<T>& a, int64_t n, const SparseRows<T>& b, int64_t m, acc_t<T>* out) {
  using A = acc_t<T>;
  for (int64_t i = 0; i < n; ++i) {
    const T* v = a.values + i * a.k;
    const int64_t* at_v = a.indices + i * a.k;
    const A zero = zero_of(v, a.k);
    for (int64_t j = 0; j < m; ++j) {
      const T* w = b.values + j * b.k;
      const int64_t* at_w = b.indices + j * b.k;
      double sum = zero + zero_of(w, b.k);
      for (int64_t x = 0, y = 0; x < a.k && y < b.k;) {
        const int64_t left = at_v[x], right = at_w[y];
        if (left == right) sum += to_acc(v[x]) * to_acc(w[y]);
        x += left <= right, y += right <= left;
      }
      out[i * m + j] = static_cast<A>(sum);
    }
  }
}

#define VLMK_INSTANTIATE(T)                                                                                             \
  template void relative_similarity(const SparseTable<T>&, const SparseRows<T>&, int64_t, acc_t<T>*, int64_t, int64_t); \
  template void relative_similarity_merged(const SparseRows<T>&, int64_t, const SparseRows<T>&, int64_t, acc_t<T>*);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)
VLMK_INSTANTIATE(bf16)
VLMK_INSTANTIATE(f16)

}  // namespace vlmk::VLMK_ISA
