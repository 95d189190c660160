// vlmkernels::roi_align and roi_align_bwd for CPU tensors (contracts: vlmkernels/ops/roi_align.py).
#include "vlmkernels/roi_align.h"

#include <torch/library.h>

#include <cmath>
#include <vector>

#include "bridge.h"

namespace vlmk {
namespace {

using at::Tensor;

constexpr int64_t kMostBins = 1 << 12, kMostSamples = 1 << 10, kMostPixels = 1 << 20;
constexpr int64_t kTaskBoxes = 256;  // of one plane or several in one task
constexpr int64_t kPrepared = 32;    // boxes in one task

void need_options(const Need& need, const RoiOptions& by) {
  const auto bins = [&](int64_t count) { return count >= 1 && count <= kMostBins; };
  need.that(bins(by.h) && bins(by.w), "the output must have from 1 to ", kMostBins, " rows and columns, got ", by.h, " x ",
            by.w);
  const auto pixels = [&](int64_t count) { return count >= 0 && count <= kMostPixels; };
  need.that(pixels(by.height) && pixels(by.width), "features must have at most ", kMostPixels, " rows and columns, got ",
            by.height, " x ", by.width);
  need.that(by.spatial_scale > 0 && std::isfinite(by.spatial_scale), "spatial_scale must be positive and finite, got ",
            by.spatial_scale);
  need.that(by.sampling_ratio >= 0 && by.sampling_ratio <= kMostSamples, "sampling_ratio must be from 0 (adaptive) to ",
            kMostSamples, ", got ", by.sampling_ratio);
}

// [K, 5] in A, each of a picture that is there.
template <class A>
Tensor checked(const char* op, const Tensor& boxes, int64_t batch) {
  const Tensor rows = boxes.to(scalar_type<A>()).contiguous();
  for (int64_t k = 0; k < rows.size(0); ++k) {
    const A picture = data<A>(rows)[5 * k];
    if (picture >= 0 && picture < batch && picture == std::floor(picture)) continue;
    C10_THROW_ERROR(IndexError, c10::str(op, ": boxes[:, 0] must be indices of pictures, in [0, B = ", batch, "), got ",
                                         picture, " in box ", k));
  }
  return rows;
}

// The boxes of each picture, in their order, and what they read.
template <class A>
struct Boxes {
  Boxes(const Tensor& rows, int64_t batch, const RoiOptions& by) : first(batch + 1) {
    const A* from = data<A>(rows);
    const int64_t count = rows.size(0);
    for (int64_t k = 0; k < count; ++k) ++first[static_cast<int64_t>(from[5 * k]) + 1];
    for (int64_t b = 0; b < batch; ++b) first[b + 1] += first[b];
    members.resize(count), of.resize(count);
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t k = 0; k < count; ++k) members[next[static_cast<int64_t>(from[5 * k])]++] = k;
    const auto each = [&](auto f) {
      for_tasks(ceil_div(count, kPrepared), 0, [&](int64_t task, Scratch&) {
        for (int64_t k = task * kPrepared; k < std::min((task + 1) * kPrepared, count); ++k) f(from + 5 * k + 1, of[k]);
      });
    };
    each([&](const A* corners, RoiBox<A>& box) { VLMK_CALL(roi_align_measure, corners, by, &box); });
    int64_t total = 0;
    for (const RoiBox<A>& box : of) total += by.h * box.each_row + by.w * box.each_col;
    places = at::empty({total}, rows.options().dtype(at::kInt));
    weights = at::empty({total}, rows.options());
    int32_t* place = data<int32_t>(places);
    A* weight = data<A>(weights);
    for (RoiBox<A>& box : of) {
      const int64_t down = by.h * box.each_row, across = by.w * box.each_col;
      box.rows = place, box.row_weights = weight, box.cols = place + down, box.col_weights = weight + down;
      place += down + across, weight += down + across;
    }
    each([&](const A* corners, RoiBox<A>& box) { VLMK_CALL(roi_align_fill, corners, by, box); });
  }

  std::vector<int64_t> first;    // [B + 1]: where the boxes of a picture begin in `members`
  std::vector<int64_t> members;  // [K]
  std::vector<RoiBox<A>> of;     // [K]
  Tensor places, weights;
};

// Contiguous planes. torch copies matrices many times faster than it copies pictures whose channels are contiguous.
Tensor planes(const Tensor& features) {
  if (features.is_contiguous() || !features.is_contiguous(at::MemoryFormat::ChannelsLast)) return features.contiguous();
  const Tensor out = on_huge_pages(at::empty(features.sizes(), features.options()));
  for (int64_t b = 0; b < features.size(0); ++b) {
    out.select(0, b).flatten(1).copy_(features.select(0, b).permute({1, 2, 0}).flatten(0, 1).t());
  }
  return out;
}

Tensor roi_align(const Tensor& features_, const Tensor& boxes_, int64_t out_height, int64_t out_width, double spatial_scale,
                 int64_t sampling_ratio, bool aligned) {
  const Need need("roi_align");
  need.tensor("features", features_, {kAny, kAny, kAny, kAny}, kFloats);
  need.tensor("boxes", boxes_, {kAny, 5}, kFloats);
  const int64_t batch = features_.size(0), channels = features_.size(1), count = boxes_.size(0);
  const RoiOptions by{features_.size(2), features_.size(3), out_height, out_width, spatial_scale, sampling_ratio, aligned};
  need_options(need, by);
  need.countable(features_.sizes());
  need.countable({count, channels, by.h, by.w});
  const Tensor features = planes(features_);
  Tensor out;
  with_storage(features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    const Tensor rows = checked<A>("roi_align", boxes_, batch);
    out = on_huge_pages(at::empty({count, channels, by.h, by.w}, features.options()));
    if (out.numel() == 0) return;
    const Boxes<A> boxes(rows, batch, by);
    const int64_t pixels = by.height * by.width, bins = by.h * by.w, scratch_bytes = VLMK_CALL(roi_align_scratch<T>, by);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t *members = boxes.members.data() + boxes.first[b], own = boxes.first[b + 1] - boxes.first[b];
      if (own == 0) continue;
      // Parts of the boxes of one plane, or all boxes of several planes
      const int64_t parts = ceil_div(own, kTaskBoxes), planes = std::max<int64_t>(kTaskBoxes / own, 1);
      for_tasks(ceil_div(channels, planes) * parts, scratch_bytes, [&](int64_t task, Scratch& scratch) {
        const int64_t from = task % parts * kTaskBoxes, c0 = task / parts * planes;
        for (int64_t c = c0; c < std::min(c0 + planes, channels); ++c) {
          VLMK_CALL(roi_align, data<T>(features) + (b * channels + c) * pixels, by, boxes.of.data(), members + from,
                    std::min(kTaskBoxes, own - from), scratch, data<T>(out) + c * bins, channels * bins);
        }
      });
    }
  });
  return out;
}

Tensor roi_align_bwd(const Tensor& dout_, const Tensor& boxes_, int64_t batch, int64_t height, int64_t width,
                     double spatial_scale, int64_t sampling_ratio, bool aligned, std::array<bool, 1> needs) {
  const Need need("roi_align_bwd");
  need.tensor("boxes", boxes_, {kAny, 5}, kFloats);
  need.tensor("dout", dout_, {boxes_.size(0), kAny, kAny, kAny}, kFloats);
  const int64_t channels = dout_.size(1);
  const RoiOptions by{height, width, dout_.size(2), dout_.size(3), spatial_scale, sampling_ratio, aligned};
  need_options(need, by);
  need.that(batch >= 0, "batch must be at least 0, got ", batch);
  need.countable(dout_.sizes());
  need.countable({batch, channels, height, width});
  if (!needs[0]) return at::empty({0}, dout_.options());
  const Tensor dout = dout_.contiguous();
  Tensor dfeatures;
  with_storage(dout.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    const Tensor rows = checked<A>("roi_align_bwd", boxes_, batch);
    dfeatures = on_huge_pages(at::empty({batch, channels, height, width}, dout.options()));
    if (dfeatures.numel() == 0) return;
    const Boxes<A> boxes(rows, batch, by);
    const int64_t pixels = height * width, bins = by.h * by.w, scratch_bytes = VLMK_CALL(roi_align_scratch<T>, by);
    constexpr bool apart = sizeof(T) < sizeof(A);
    const int64_t sum_bytes = apart ? (pixels + 64) * static_cast<int64_t>(sizeof(A)) : 0;
    for_tasks(batch * channels, scratch_bytes + sum_bytes, [&](int64_t plane, Scratch& scratch) {
      const int64_t b = plane / channels, c = plane % channels, first = boxes.first[b];
      T* to = data<T>(dfeatures) + plane * pixels;
      A* sums;
      if constexpr (apart) {
        sums = scratch.take<A>(pixels);
      } else {
        sums = to;
      }
      VLMK_CALL(roi_align_bwd, data<T>(dout) + c * bins, channels * bins, by, boxes.of.data(), boxes.members.data() + first,
                boxes.first[b + 1] - first, scratch, sums, to);
    });
  });
  return dfeatures;
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmkernels, CPU, m) {
  m.impl("roi_align", &roi_align);
  m.impl("roi_align_bwd", &roi_align_bwd);
}

}  // namespace vlmk
