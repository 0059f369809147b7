// A unit of a Winograd convolution without Winograd. Included inside an unnamed namespace.
#pragma once

#include "conv/epilogue_body.h"
#include "conv/pack_body.h"
#include "conv/tile_body.h"
#include "conv/winograd_layout.h"

// One panel of one unit with nine taps: NaN and infinities stay where a convolution has them. Rare, so the panel is
// packed when it is needed.
template <class D, class T, int kTile, class F>
inline void direct_unit(const ConvArgs& g, const WinogradLayout& layout, int64_t unit, const PanelSpan& span,
                        typename D::C* scratch, const F& finish, PanelSums<typename D::Ops>* sums) {
  using I = typename D::Ops;
  using C = typename D::C;
  ConvPackArgs w = *g.raw;
  const int64_t size = w.floats ? sizeof(float) : sizeof(T);
  w.weight = static_cast<const char*>(w.weight) + span.column * w.stride_out * size;
  w.outs = span.count;
  w.panels = scratch;
  pack_weight<D, T>(w, 0, 1);
  C* patch = scratch + whole(9 * g.a.c * layout.panel, kSkew);
  for_strips(g, unit, [&](const TileStrip& strip, int64_t) {
    Patch p;
    p.images = 1;
    p.image = strip.image;
    p.j0 = strip.row * kTileOut;
    p.i0 = strip.col * kTileOut;
    p.j1 = p.j0 + kTileOut < g.oh ? p.j0 + kTileOut : g.oh;
    p.i1 = p.i0 + strip.count * kTileOut < g.ow ? p.i0 + strip.count * kTileOut : g.ow;
    p.row0 = p.j0 + g.row_tap[0];
    p.col0 = p.i0 + g.col_tap[0];
    p.rows = p.j1 - p.j0 + 2;
    p.cols = p.i1 - p.i0 + 2;
    p.row_step = p.col_step = p.step_h = p.step_w = 1;
    with_operand<I, T>(g.a, [&](const auto& operand) { pack_patch<D>(g, p, operand, patch); });
    TapOffsets taps;
    taps.rows = taps.cols = 3;
    for (int t = 0; t < 3; ++t) {
      taps.row[t] = t * p.cols * g.a.c;
      taps.col[t] = t * g.a.c;
    }
    for (int64_t j = p.j0; j < p.j1; ++j) {
      for (int64_t i = p.i0; i < p.i1; i += kTile) {
        const int64_t rows = p.i1 - i < kTile ? p.i1 - i : kTile;
        int64_t at[kTile];
        for (int64_t r = 0; r < rows; ++r) at[r] = (p.image * g.y_h + j) * g.y_w + i + r;
        alignas(64) typename I::S values[kTile * 2 * I::kWidth];
        const Multiply<D> multiply =
            g.vectors == 1 ? multiply_rows<D, kTile, 1>(rows) : multiply_rows<D, kTile, 2>(rows);
        multiply(taps, patch + ((j - p.j0) * p.cols + i - p.i0) * g.a.c, g.a.c, scratch, g.a.c, values, {});
        finish.tile(span, at, static_cast<int>(rows), values, sums);
      }
    }
  });
}
