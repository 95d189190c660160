#pragma once
// What is better than what, and lists of the best.
#include <algorithm>

#include "pack.h"
#include "simd.h"
#include "vlmkernels/retrieval.h"

namespace vlmk::VLMK_ISA {
namespace {

constexpr int64_t kOffered = 32;  // scores that are compared before any is looked at

// Of numbers, which NaN is not.
struct Better {
  template <class A>
  bool operator()(const Found<A>& x, const Found<A>& y) const {
    return x.value != y.value ? x.value > y.value : x.index < y.index;
  }
};
struct Earlier {
  template <class A>
  bool operator()(const Found<A>& x, const Found<A>& y) const {
    return x.index < y.index;
  }
};

// Whether a score that comes later is among the k best: not one that is NaN, and any number if `least` is.
template <class A>
VLMK_INLINE bool is_better(A score, A least) {
  return (score == score) & !(score <= least);
}

template <class A>
void keep(const Best<A>& best, int64_t row, A value, int64_t index) {
  Found<A>* found = best.found + row * best.room;
  found[best.held[row]++] = {value, index};
  if (best.held[row] < best.room) return;
  std::nth_element(found, found + best.k - 1, found + best.room, Better());
  best.held[row] = best.k;
  best.least[row] = found[best.k - 1].value;
}

// Calls f(c) for the columns c of a row of scores that are better than the least of their lists, `step` lists apart.
template <int step, class A, class F>
VLMK_INLINE void for_better(const A* scores, const A* least, int64_t cols, F f) {
  for (int64_t c0 = 0; c0 < cols; c0 += kOffered) {
    const int64_t c1 = min_(c0 + kOffered, cols);
    int any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t c = c0; c < c1; ++c) any |= is_better(scores[c], least[step * c]);
    for (int64_t c = c0; any && c < c1; ++c) {
      if (is_better(scores[c], least[step * c])) f(c);
    }
  }
}

// The k best of list `row` of all lists, or as many as there are, in any order: how many are in `scratch` then.
template <class A>
int64_t gathered(const Best<A>* lists, int64_t count, int64_t row, int64_t k, Found<A>* scratch) {
  int64_t held = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Found<A>* found = lists[i].found + row * lists[i].room;
    for (int64_t j = 0; j < lists[i].held[row]; ++j) scratch[held++] = found[j];
  }
  if (held <= k) return held;
  std::nth_element(scratch, scratch + k - 1, scratch + held, Better());
  return k;
}

// Fewer than k were found: the others, where there are any, are NaN. Appends their indices, which rise: those in [0, end) that
// are `allowed` and not among the `held` in `found`. How many there are then.
template <class A, class Allowed>
int64_t append_nan(Found<A>* found, int64_t held, int64_t k, int64_t end, Allowed allowed) {
  if (held == k) return k;
  std::sort(found, found + held, Earlier());
  int64_t place = held;
  for (int64_t index = 0, next = 0; place < k && index < end; ++index) {
    if (next < held && found[next].index == index) {
      ++next;
    } else if (allowed(index)) {
      found[place++] = {static_cast<A>(__builtin_nan("")), index};
    }
  }
  return place;
}

}  // namespace
}  // namespace vlmk::VLMK_ISA
