// Suppression of boxes and features of boxes, against loops over pairs and over samples.
#include <algorithm>
#include <vector>

#include "check.h"
#include "vlmkernels/nms.h"
#include "vlmkernels/roi_align.h"

namespace {

template <class A>
bool overlap(const A* a, const A* b, A threshold) {
  const A x = std::max(std::min(a[2], b[2]) - std::max(a[0], b[0]), A(0));
  const A y = std::max(std::min(a[3], b[3]) - std::max(a[1], b[1]), A(0));
  const A common = x * y, first = (a[2] - a[0]) * (a[3] - a[1]), second = (b[2] - b[0]) * (b[3] - b[1]);
  return common / (first + second - common) > threshold;
}

// In two blocks: the second is compared with what is kept of the first.
template <class A>
void test_nms() {
  const int64_t n = 150, half = 70;
  std::vector<A> boxes(4 * n), columns(5 * n);
  std::vector<int64_t> order(n), kept;
  for (int64_t i = 0; i < n; ++i) {
    order[i] = (i * 37 + 11) % n;
    A* box = boxes.data() + 4 * i;
    box[0] = A(i * 7 % 31), box[1] = A(i * 5 % 23), box[2] = box[0] + A(8 + i % 5), box[3] = box[1] + A(7 + i % 3);
  }
  for (const int64_t i : order) {
    const auto hits = [&](int64_t j) { return overlap(&boxes[4 * j], &boxes[4 * i], A(0.4)); };
    if (std::none_of(kept.begin(), kept.end(), hits)) kept.push_back(i);
  }
  const vlmk::NmsBoxes<A> of{columns.data(), n};
  std::vector<int32_t> gone(n);
  VLMK_CALL(nms_columns, boxes.data(), order.data(), n, of);
  int64_t to = 0;
  for (int64_t first = 0, count = half; first < n; first += count, count = n - half) {
    VLMK_CALL(nms_against, of, int64_t(0), to, first, count, A(0.4), gone.data() + first);
    to = VLMK_CALL(nms_among, of, to, first, count, A(0.4), gone.data() + first);
  }
  std::vector<int64_t> stay;
  for (int64_t i = 0; i < n; ++i) {
    if (!gone[i]) stay.push_back(order[i]);
  }
  check("boxes that stay", to, kept.size(), 0);
  check("boxes that stay, listed", stay == kept, 1, 0);
}

// Calls f(place, weight) for what a sample reads.
template <class F>
void around(double at, int64_t length, F f) {
  if (at < -1 || at > length) return;
  at = std::min(std::max(at, 0.0), length - 1.0);
  const int64_t low = static_cast<int64_t>(at);
  f(low, 1 - (at - low));
  f(std::min(low + 1, length - 1), at - low);
}

template <class A>
void test_roi_align(int64_t ratio, bool aligned) {
  const vlmk::RoiOptions by{9, 23, 3, 2, 0.5, ratio, aligned};
  const std::vector<A> corners{4, 3, 25, 15, -9, -8, 60, 30, -80, -80, -70, -70, 9, 9, 9, 9};
  const int64_t count = corners.size() / 4, pixels = by.height * by.width, bins = by.h * by.w;
  std::vector<A> plane(pixels), out(count * bins, A(-7)), dout(count * bins), dplane(pixels, A(-7));
  for (int64_t i = 0; i < pixels; ++i) plane[i] = std::sin(A(0.7) * i);
  for (int64_t i = 0; i < count * bins; ++i) dout[i] = std::cos(A(0.3) * i);
  std::vector<double> want(count * bins), dwant(pixels);
  for (int64_t k = 0; k < count; ++k) {
    const A* box = &corners[4 * k];
    const double shift = aligned ? 0.5 : 0, least = aligned ? -1e9 : 1, x = box[0] * 0.5 - shift, y = box[1] * 0.5 - shift;
    const double bin_w = std::max((box[2] - box[0]) * 0.5, least) / by.w;
    const double bin_h = std::max((box[3] - box[1]) * 0.5, least) / by.h;
    const double cols = ratio ? ratio : std::ceil(bin_w), rows = ratio ? ratio : std::ceil(bin_h);
    for (int64_t bin = 0; bin < bins; ++bin) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < cols; ++j) {
          around(y + bin / by.w * bin_h + (i + 0.5) * bin_h / rows, by.height, [&](int64_t r, double a) {
            around(x + bin % by.w * bin_w + (j + 0.5) * bin_w / cols, by.width, [&](int64_t c, double b) {
              want[k * bins + bin] += a * b * plane[r * by.width + c] / (rows * cols);
              dwant[r * by.width + c] += a * b * dout[k * bins + bin] / (rows * cols);
            });
          });
        }
      }
    }
  }
  std::vector<vlmk::RoiBox<A>> boxes(count);
  std::vector<std::vector<A>> weights(count);
  std::vector<std::vector<int32_t>> places(count);
  std::vector<int64_t> members(count);
  for (int64_t k = 0; k < count; ++k) {
    vlmk::RoiBox<A>& box = boxes[k];
    members[k] = k;
    VLMK_CALL(roi_align_measure, &corners[4 * k], by, &box);
    const int64_t down = by.h * box.each_row, across = by.w * box.each_col;
    weights[k].resize(down + across), places[k].resize(down + across);
    box.rows = places[k].data(), box.cols = box.rows + down;
    box.row_weights = weights[k].data(), box.col_weights = box.row_weights + down;
    VLMK_CALL(roi_align_fill, &corners[4 * k], by, box);
  }
  std::vector<double> memory(VLMK_CALL(roi_align_scratch<A>, by) / sizeof(double) + 16);
  const auto start = (reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64;
  const vlmk::Scratch scratch{reinterpret_cast<char*>(start)};
  VLMK_CALL(roi_align, plane.data(), by, boxes.data(), members.data(), count, scratch, out.data(), bins);
  VLMK_CALL(roi_align_bwd, dout.data(), bins, by, boxes.data(), members.data(), count, scratch, dplane.data(), dplane.data());
  for (int64_t i = 0; i < count * bins; ++i) check("roi_align", out[i], want[i], 1e-5);
  for (int64_t i = 0; i < pixels; ++i) check("gradient of roi_align", dplane[i], dwant[i], 1e-5);
}

}  // namespace

void test_detection() {
  test_nms<float>(), test_nms<double>();
  for (const int64_t ratio : {0, 2}) {
    for (const bool aligned : {true, false}) test_roi_align<float>(ratio, aligned), test_roi_align<double>(ratio, aligned);
  }
}
