// Convolution, once for every instruction set and dtype: pack a patch of the operand, multiply it by panels of the
// weight in register tiles, finish and store each tile. Forward and data gradient are the same kernel; what differs is
// in ConvArgs. Source: docs/convolution.md. Included inside an unnamed namespace after the vector headers.
#pragma once

#include "conv/dot.h"
#include "conv/items_body.h"
#include "conv/tile_body.h"
#include "simd/vec_scalar.h"

// The operand of one unit of work as the register tile walks it, in elements.
template <class C>
struct View {
  const C* data;
  int64_t pixel, line;     // from one column and row to the next
  int64_t step, row_step;  // from one position of a row to the next, and from one row of positions to the next
  int64_t channels;
  TapOffsets taps;
};

template <class C>
inline View<C> view_of(const ConvArgs& g, const Patch& p, const C* packed) {
  View<C> v;
  v.data = packed;
  v.pixel = p.images * g.c_padded;
  v.line = p.cols * v.pixel;
  int64_t step_w = p.step_w, step_h = p.step_h;
  if (g.direct) {
    v.pixel = g.a.c;
    v.line = g.a.w * v.pixel;
    step_w = g.step_w;
    step_h = g.step_h;
    v.data = static_cast<const C*>(g.a.data) + ((p.image * g.a.h + p.row0) * g.a.w + p.col0) * v.pixel;
  }
  // Neighbouring positions of all images of the unit are one row; a stride leaves one image a unit, or planes.
  v.step = step_w * (v.pixel / p.images);
  v.row_step = step_h * v.line;
  v.taps.rows = g.rows;
  v.taps.cols = g.cols;
  for (int t = 0; t < g.rows; ++t) v.taps.row[t] = (g.row_tap[t] - g.row_tap[0]) * v.line;
  for (int u = 0; u < g.cols; ++u) {
    const int64_t column = g.col_tap[u] - g.col_tap[0];
    v.taps.col[u] = (column % g.planes * (p.cols / g.planes) + column / g.planes) * v.pixel;
  }
  v.channels = g.group_c;
  // Columns that are neighbours in memory are one longer run of channels: few channels make too short a loop.
  const bool neighbours = g.cols > 1 && g.planes == 1 && g.col_tap[1] - g.col_tap[0] == 1;
  if (neighbours && g.groups == 1 && p.images == 1 && v.pixel == g.group_c) {
    v.channels *= g.cols;
    v.taps.cols = 1;
  }
  return v;
}

// The share of tile `i` of a unit's `tiles` in bringing the next panel of the weight into the second-level cache: with
// few tiles, its way from memory would not be hidden. What does not fit beside this panel and the operand is left.
template <class D>
inline Ahead panel_ahead(const ConvArgs& g, const typename D::C* next, int64_t panel_size, int64_t tiles, int64_t i) {
  constexpr int64_t kMostTiles = 32, kMostBytes = 320 * 1024, kSize = sizeof(typename D::C);
  if (tiles > kMostTiles || panel_size * kSize > kMostBytes) return {};
  const int64_t step = g.vectors * D::Ops::kWidth * D::kPair * kSize / tiles;
  return {reinterpret_cast<const char*>(next) + panel_size * kSize * i / tiles, step};
}

// The operand of a 1x1 convolution ahead of its use: where it is read in place that of the next tile, else of the same
// positions of the next unit, which is packed then. Every panel of a tile brings its share.
template <class D, class T, int kTile>
class OperandAhead {
 public:
  void prepare(const ConvArgs& g, const Patch& p, int64_t panels, int64_t channels) {
    used_ = g.tiles_first && g.rows == 1 && g.cols == 1 && g.a.n == 1 && g.a.h == 1 && g.ow == g.a.w;
    pixel_ = g.a.c * static_cast<int64_t>(sizeof(T));
    first_ = static_cast<const char*>(g.a.data) + p.i0 * pixel_;
    second_ = g.a.kind == OperandKind::kGradient && g.a.z != nullptr ? static_cast<const char*>(g.a.z) + p.i0 * pixel_
                                                                     : nullptr;
    distance_ = g.direct ? 0 : p.i1 - p.i0;
    // Here and not for every tile: where channels are few, a division would be felt.
    const bool pair = second_ != nullptr && panels > 1;
    half_ = pair ? panels / 2 : panels;
    first_share_ = pixel_ * kTile / half_;
    second_share_ = pair ? pixel_ * kTile / (panels - half_) : 0;
    first_step_ = first_share_ * D::kPair / channels;
    second_step_ = second_share_ * D::kPair / channels;
  }
  bool used() const { return used_; }
  Ahead share(const TileAt& at) const {
    const int64_t next = (distance_ == 0 ? at.u + at.rows : at.u + distance_) * pixel_;
    if (at.panel < half_) return {first_ + next + at.panel * first_share_, first_step_};
    return {second_ + next + (at.panel - half_) * second_share_, second_step_};
  }

 private:
  bool used_ = false;
  int64_t pixel_ = 0, distance_ = 0;
  int64_t half_ = 1, first_share_ = 0, second_share_ = 0, first_step_ = 0, second_step_ = 0;  // bytes
  const char *first_ = nullptr, *second_ = nullptr;
};

template <class D, class T, int kTile>
class Product {
  using I = typename D::Ops;
  using C = typename D::C;

 public:
  explicit Product(const ConvArgs& args)
      : g_(args),
        group_k_(g_.k / g_.groups),
        panel_(g_.vectors * I::kWidth),
        group_panels_((group_k_ + panel_ - 1) / panel_),
        panel_size_(static_cast<int64_t>(g_.rows) * g_.cols * g_.group_c * panel_) {}

  int64_t panels() const { return g_.groups * group_panels_; }
  PanelSpan span(int64_t index) const {
    const int64_t group = group_of(index), first = (index - group * group_panels_) * panel_;
    return {group * group_k_ + first, group_k_ - first < panel_ ? group_k_ - first : panel_};
  }
  void prepare(const Patch& p, bool same, void* memory) {
    C* patch = static_cast<C*>(memory);
    if (!g_.direct && !same && g_.rows > 0) {
      with_operand<I, T>(g_.a, [&](const auto& operand) {
        if constexpr (D::kTiles) {
          if (g_.fold > 0) return pack_runs<D>(g_, p, operand, patch);
        }
        pack_patch<D>(g_, p, operand, patch);
      });
    }
    view_ = view_of<C>(g_, p, patch);
    operand_ahead_.prepare(g_, p, panels(), view_.channels);
  }
  template <class F>
  FR_INLINE void tile(const TileAt& at, const PanelSpan& span, const int64_t* pixel, const F& finish,
                      PanelSums<I>* sums) {
    const C* a = view_.data + at.j * view_.row_step + group_of(at.panel) * g_.group_c + at.u * view_.step;
    const C* b = static_cast<const C*>(g_.weight) + at.panel * panel_size_;
    const C* next = static_cast<const C*>(g_.weight) + at.next_panel * panel_size_;
    const Ahead ahead =
        operand_ahead_.used() ? operand_ahead_.share(at) : panel_ahead<D>(g_, next, panel_size_, at.tiles, at.tile);
    if constexpr (!D::kTiles) {
      if (at.rows == kTile && finish.takes_registers(span, *sums)) {
        return accumulate<D, kTile, 2>(view_.taps, a, view_.step, b, view_.channels, ahead, [&](auto& sum) FR_INLINE {
          finish.template registers<D::kFlushes>(span.column, pixel, sum, sums);
        });
      }
    }
    alignas(64) typename I::S values[kTile * 2 * I::kWidth];
    multiply_tile<D, kTile>(&state_, g_.vectors, at.rows, view_.taps, a, view_.step, b, view_.channels, values, ahead);
    if constexpr (D::kTiles) {
      if (finish.takes_registers(span, *sums)) {
        return finish.template stored<D::kFlushes>(span.column, pixel, static_cast<int>(at.rows), values, sums);
      }
    }
    finish.tile(span, pixel, static_cast<int>(at.rows), values, sums);
  }

 private:
  int64_t group_of(int64_t panel) const { return g_.groups == 1 ? 0 : panel / group_panels_; }

  const ConvArgs& g_;
  const int64_t group_k_, panel_, group_panels_, panel_size_;
  View<C> view_;
  OperandAhead<D, T, kTile> operand_ahead_;
  typename D::State state_;
};

template <class D, class T, int kTile>
inline void convolve(const ConvArgs& g, int64_t begin, int64_t end, void* scratch) {
  Product<D, T, kTile> product(g);
  with_epilogue<typename D::Ops, T>(g, [&](const auto& finish) {
    run_items<typename D::Ops, kTile>(g, begin, end, static_cast<char*>(scratch), product, finish);
  });
}
