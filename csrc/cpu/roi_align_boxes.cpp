// Compiled without contraction: the rounding of a position decides on the number of samples, and which are in the picture.
#include "registers.h"
#include "vlmkernels/roi_align.h"

namespace vlmk::VLMK_ISA {
namespace {

constexpr double kFar = 1 << 20;  // where corners end
constexpr int64_t kTried = 1024;  // samples of a bin of which all are looked at

// The bins of a box along an axis of `length` pixels.
template <class A>
struct Axis {
  Axis(A from, A to, int64_t bins_, int64_t length_, const RoiOptions& by) : bins(bins_), length(length_) {
    const A scale = static_cast<A>(by.spatial_scale), offset = by.aligned ? A(0.5) : A(0);
    start = limited(from * scale) - offset;
    A extent = limited(to * scale) - offset - start;
    extent = !by.aligned && extent < 1 ? A(1) : extent;
    size = extent / static_cast<A>(bins);
    samples = by.sampling_ratio ? by.sampling_ratio : size > 0 ? static_cast<int64_t>(std::ceil(size)) : 0;
  }
  static A limited(A x) { return x < A(-kFar) ? A(-kFar) : x > A(kFar) ? A(kFar) : x; }

  // Calls f(place, weight) for what the samples of a bin read, from low to high places.
  template <class F>
  VLMK_INLINE void for_places(int64_t bin, F f) const {
    if (length == 0) return;
    const A base = start + static_cast<A>(bin) * size;
    int64_t begin = 0, end = samples;
    if (samples > kTried) {  // they are at most a pixel and at least half a pixel apart
      const double step = size / samples;
      begin = static_cast<int64_t>(min_(max_((-1 - base) / step - 3, 0.0), double(samples)));
      end = static_cast<int64_t>(min_(max_((length - base) / step + 3, 0.0), double(samples)));
    }
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = size < 0 ? samples - 1 - i : i;
      const A at = base + (static_cast<A>(sample) + A(0.5)) * size / static_cast<A>(samples);
      if (!(at >= -1 && at <= length)) continue;
      const A inside = min_(max_(at, A(0)), static_cast<A>(length - 1));
      const int32_t low = static_cast<int32_t>(inside);
      const A part = inside - static_cast<A>(low);
      f(low, 1 - part);
      if (part > 0) f(low + 1, part);
    }
  }

  A start, size;
  int64_t samples, bins, length;
};

// Collects what is read at one place: a place comes again before the one after the next is reached.
template <class A>
struct Places {
  int32_t* at;  // or null, to count them
  A* weights;
  int64_t count = 0;
  int32_t last[2] = {-1, -1};
  VLMK_INLINE void add(int32_t place, A weight) {
    if (place == last[0] || place == last[1]) {
      if (at) weights[count - (place == last[0] ? 1 : 2)] += weight;
      return;
    }
    if (at) at[count] = place, weights[count] = weight;
    last[1] = last[0], last[0] = place;
    ++count;
  }
};

struct Extent {
  int64_t each = 0, from = INT32_MAX, to = 0;
};

template <class A>
Extent measured(const Axis<A>& axis) {
  Extent extent;
  for (int64_t bin = 0; bin < axis.bins; ++bin) {
    Places<A> places{nullptr, nullptr};
    axis.for_places(bin, [&](int32_t place, A weight) {
      places.add(place, weight);
      extent.from = min_<int64_t>(extent.from, place), extent.to = max_<int64_t>(extent.to, place + 1);
    });
    extent.each = max_(extent.each, (places.count + 1) / 2 * 2);
  }
  return extent;
}

template <class A>
void fill(const Axis<A>& axis, int64_t each, int32_t shift, int32_t beyond, int32_t* at, A* weights) {
  for (int64_t bin = 0; bin < axis.bins; ++bin, at += each, weights += each) {
    Places<A> places{at, weights};
    axis.for_places(bin, [&](int32_t place, A weight) { places.add(place - shift, weight); });
    for (int64_t i = places.count; i < each; ++i) at[i] = beyond, weights[i] = 0;
  }
}

template <class A>
Axis<A> down(const A* corners, const RoiOptions& by) {
  return {corners[1], corners[3], by.h, by.height, by};
}
template <class A>
Axis<A> across(const A* corners, const RoiOptions& by) {
  return {corners[0], corners[2], by.w, by.width, by};
}

}  // namespace

template <class A>
void roi_align_measure(const A* corners, const RoiOptions& by, RoiBox<A>* box) {
  const Axis<A> y = down(corners, by), x = across(corners, by);
  const Extent rows = measured(y), cols = measured(x);
  const bool empty = rows.each == 0 || cols.each == 0;
  box->each_row = empty ? 0 : rows.each;
  box->each_col = empty ? 0 : cols.each;
  // Whole registers where the picture has them
  constexpr int64_t lanes = Registers<A>::lanes;
  const int64_t whole = empty ? 0 : (cols.to - cols.from + lanes - 1) / lanes * lanes;
  box->span = min_(whole, by.width);
  box->left = empty ? 0 : min_(cols.from, by.width - box->span);
  box->share = A(1) / max_(static_cast<A>(y.samples) * static_cast<A>(x.samples), A(1));
}

template <class A>
void roi_align_fill(const A* corners, const RoiOptions& by, const RoiBox<A>& box) {
  if (box.span == 0) return;
  fill(down(corners, by), box.each_row, 0, -1, box.rows, box.row_weights);
  fill(across(corners, by), box.each_col, static_cast<int32_t>(box.left), static_cast<int32_t>(box.span), box.cols,
       box.col_weights);
}

#define VLMK_INSTANTIATE(A)                                                 \
  template void roi_align_measure(const A*, const RoiOptions&, RoiBox<A>*); \
  template void roi_align_fill(const A*, const RoiOptions&, const RoiBox<A>&);
VLMK_INSTANTIATE(float)
VLMK_INSTANTIATE(double)

}  // namespace vlmk::VLMK_ISA
