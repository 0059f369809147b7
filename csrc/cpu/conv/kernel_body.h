// Convolution, once for every instruction set and dtype: pack a patch of the operand, multiply it by panels of the
// weight in register tiles, finish and store each tile. Forward and data gradient are the same kernel; what differs is
// in ConvArgs. Source: docs/convolution.md. Included inside an unnamed namespace after the vector headers.
#pragma once

#include "conv/dot.h"
#include "conv/epilogue_body.h"
#include "conv/operand_body.h"
#include "conv/pack_body.h"
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
  // Neighbouring positions of all images of the unit are one row; a stride leaves one image a unit.
  v.step = step_w * (v.pixel / p.images);
  v.row_step = step_h * v.line;
  v.taps.rows = g.rows;
  v.taps.cols = g.cols;
  for (int t = 0; t < g.rows; ++t) v.taps.row[t] = (g.row_tap[t] - g.row_tap[0]) * v.line;
  for (int u = 0; u < g.cols; ++u) v.taps.col[u] = (g.col_tap[u] - g.col_tap[0]) * v.pixel;
  v.channels = g.group_c;
  // Columns that are neighbours in memory are one longer run of channels: few channels make too short a loop.
  if (g.cols > 1 && g.groups == 1 && p.images == 1 && v.pixel == g.group_c && g.col_tap[1] - g.col_tap[0] == 1) {
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

// Pixels of y for positions [u, u + rows) of row j of a unit, in which images alternate.
inline void tile_pixels(const ConvArgs& g, const Patch& p, int64_t j, int64_t u, int64_t rows, int64_t* pixel) {
  const int64_t between = g.y_h * g.y_w;
  int64_t image = p.images == 1 ? 0 : u % p.images, i = p.images == 1 ? u : u / p.images;
  const int64_t row = (p.image * g.y_h + j * g.out_step_h + g.out_first_h) * g.y_w + g.out_first_w;
  int64_t at = row + (p.i0 + i) * g.out_step_w;
  for (int64_t r = 0; r < rows; ++r) {
    pixel[r] = at + image * between;
    if (++image == p.images) {
      image = 0;
      at += g.out_step_w;
    }
  }
}

template <class D, class T, int kTile, class F>
inline void run_items(const ConvArgs& g, int64_t begin, int64_t end, char* scratch, const F& finish) {
  using I = typename D::Ops;
  using C = typename D::C;
  using Sums = PanelSums<I>;
  static_assert(sizeof(Sums) <= kPanelSumsBytes);
  const int64_t group_k = g.k / g.groups, panel = g.vectors * I::kWidth, panels = (group_k + panel - 1) / panel;
  const int64_t panel_size = static_cast<int64_t>(g.rows) * g.cols * g.group_c * panel, all = g.groups * panels;
  Sums* sums = reinterpret_cast<Sums*>(scratch);
  C* patch = reinterpret_cast<C*>(scratch + all * kPanelSumsBytes);
  int64_t packed = -1;
  typename D::State state;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t unit = item / g.splits, part = item % g.splits;
    const Patch p = patch_of(g, unit);
    if (!g.direct && packed != unit && g.rows > 0) {
      with_operand<I, T>(g.a, [&](const auto& operand) { pack_patch<D>(g, p, operand, patch); });
      packed = unit;
    }
    const View<C> v = view_of<C>(g, p, patch);
    const int64_t length = (p.i1 - p.i0) * p.images, tiles = (length + kTile - 1) / kTile;
    const auto span_of = [&](int64_t index) {
      const int64_t first = index % panels * panel;
      return PanelSpan{index / panels * group_k + first, group_k - first < panel ? group_k - first : panel};
    };
    const int64_t first = all * part / g.splits, last = all * (part + 1) / g.splits;
    const int64_t unit_tiles = (p.j1 - p.j0) * tiles;
    const auto one = [&](int64_t index, int64_t j, int64_t tile, int64_t u, int64_t rows,
                         const int64_t* pixel) FR_INLINE {
      const PanelSpan span = span_of(index);
      finish.prefetch(span, pixel, rows);
      const C* a = v.data + (j - p.j0) * v.row_step + index / panels * g.group_c + u * v.step;
      const C* b = static_cast<const C*>(g.weight) + index * panel_size;
      alignas(64) typename I::S values[kTile * 2 * I::kWidth];
      const C* next = static_cast<const C*>(g.weight) + (index + 1 < last ? index + 1 : first) * panel_size;
      const Ahead ahead = panel_ahead<D>(g, next, panel_size, unit_tiles, (j - p.j0) * tiles + tile);
      multiply_tile<D, kTile>(&state, g.vectors, rows, v.taps, a, v.step, b, v.channels, values, ahead);
      finish.tile(span, pixel, static_cast<int>(rows), values, &sums[index]);
    };
    for (int64_t index = first; index < last; ++index) finish.start(&sums[index]);
    // Few weights stay in the second-level cache: then a tile meets all panels in turn, and pixels of y are written,
    // and what is read beside them, whole. Else a panel meets all tiles.
    const int64_t outer = g.tiles_first ? 1 : last - first, inner = g.tiles_first ? last - first : 1;
    for (int64_t group = 0; group < outer; ++group) {
      for (int64_t j = p.j0; j < p.j1; ++j) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t u = length * tile / tiles, rows = length * (tile + 1) / tiles - u;
          int64_t pixel[kTile];
          tile_pixels(g, p, j, u, rows, pixel);
          for (int64_t index = 0; index < inner; ++index) one(first + group + index, j, tile, u, rows, pixel);
        }
      }
    }
    for (int64_t index = first; index < last; ++index) finish.finish(span_of(index), unit, sums[index]);
  }
}

template <class D, class T, int kTile>
inline void convolve(const ConvArgs& g, int64_t begin, int64_t end, void* scratch) {
  with_epilogue<typename D::Ops, T>(
      g, [&](const auto& finish) { run_items<D, T, kTile>(g, begin, end, static_cast<char*>(scratch), finish); });
}
