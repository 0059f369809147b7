// Convolution of groups of few channels, as many of them to a vector as fill it: a panel is one vector of filters
// across groups. docs/convolution.md. Included inside an unnamed namespace after the vector headers.
#pragma once

#include "conv/grouped_pack.h"
#include "conv/grouped_tile.h"
#include "conv/items_body.h"

template <class D, class T, int kTile>
class GroupedProduct {
  using I = typename D::Ops;
  using C = typename D::C;
  static constexpr int64_t kWidth = I::kWidth;

 public:
  explicit GroupedProduct(const ConvArgs& args)
      : g_(args), panel_size_(static_cast<int64_t>(g_.rows) * g_.cols * g_.group_c * kWidth), lanes_(g_.group_c) {
    tile_.group = g_.group_c;
    tile_.lanes = lanes_.lanes;
    tile_.rows = g_.rows;
  }

  int64_t panels() const { return (g_.k + kWidth - 1) / kWidth; }
  PanelSpan span(int64_t index) const {
    const int64_t first = index * kWidth;
    return {first, g_.k - first < kWidth ? g_.k - first : kWidth};
  }
  void prepare(const Patch& p, bool same, void* memory) {
    planes_ = Planes<I, C>(p, memory);
    if (!same && g_.rows > 0) {
      with_operand<I, T>(g_.a, [&](const auto& operand) { pack_planes(g_.a, p, 0, g_.a.c, operand, planes_); });
    }
    const int64_t pixel = p.images * kWidth;
    row_step_ = p.step_h * planes_.line;
    // Neighbouring positions of all images of the unit are one row; a stride leaves one image a unit.
    runs_.step = p.step_w;
    tile_.step = p.step_w * kWidth;
    for (int t = 0; t < g_.rows; ++t) tile_.row[t] = (g_.row_tap[t] - g_.row_tap[0]) * planes_.line;
    for (int u = 0; u < g_.cols; ++u) tile_.run[u] = (g_.col_tap[u] - g_.col_tap[0]) * pixel;
    runs_.cols = g_.cols;
    runs_.apart = p.images;
    const bool neighbours = g_.cols > 1 && g_.col_tap[g_.cols - 1] - g_.col_tap[0] == g_.cols - 1;
    if (!neighbours || !have_runs(runs_)) runs_.cols = 1;
    tile_.runs = g_.cols / runs_.cols;
  }
  template <class F>
  FR_INLINE void tile(const TileAt& at, const PanelSpan& span, const int64_t* pixel, const F& finish,
                      PanelSums<I>* sums) const {
    const C* a = planes_.data + at.panel * planes_.plane + at.j * row_step_ + at.u * tile_.step;
    const C* b = static_cast<const C*>(g_.weight) + at.panel * panel_size_;
    alignas(64) typename I::S values[kTile * kWidth];
    multiply_groups_for<D, kTile>(runs_, at.rows)(tile_, a, b, values);
    finish.tile(span, pixel, static_cast<int>(at.rows), values, sums);
  }

 private:
  const ConvArgs& g_;
  const int64_t panel_size_;
  const GroupLanes<kWidth, D::kPair> lanes_;
  Planes<I, C> planes_;
  GroupedTile tile_;
  TapRuns runs_;
  int64_t row_step_ = 0;
};

template <class D, class T, int kTile>
inline void convolve_groups(const ConvArgs& g, int64_t begin, int64_t end, void* scratch) {
  GroupedProduct<D, T, kTile> product(g);
  with_epilogue<typename D::Ops, T>(g, [&](const auto& finish) {
    run_items<typename D::Ops, kTile>(g, begin, end, static_cast<char*>(scratch), product, finish);
  });
}
