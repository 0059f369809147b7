// Convolution by Winograd's F(4x4, 3x3) in single precision: 36 multiplications do the work of 144. Prologues and
// epilogues are those of the direct kernel. Source: docs/numerics.md. Included inside an unnamed namespace after the
// vector headers.
#pragma once

#include "conv/dot.h"
#include "conv/tile_body.h"
#include "conv/winograd_direct.h"
#include "conv/winograd_input.h"
#include "conv/winograd_output.h"
#include "conv/winograd_pack.h"

// What a unit adds to the input that its neighbours have read.
template <class T>
struct UnitInput {
  int64_t count = 0;
  int64_t pixel[kMostUnitTiles * 16];
  void fill(const ConvArgs& g, int64_t unit) {
    count = 0;
    for_strips(g, unit, [&](const TileStrip& strip, int64_t) {
      for (int64_t r = 2; r < 6; ++r) {
        const int64_t row = strip.row * kTileOut + g.row_tap[0] + r;
        if (row < 0 || row >= g.a.h) continue;
        for (int64_t x = 2; x < strip.width(); ++x) {
          const int64_t col = strip.col * kTileOut + g.col_tap[0] + x;
          if (col >= 0 && col < g.a.w) pixel[count++] = (strip.image * g.a.h + row) * g.a.w + col;
        }
      }
    });
  }
  void prefetch(const ConvArgs& g, int64_t i) const {
    const int64_t at = pixel[i] * g.a.c;
    for (int64_t c = 0; c < g.a.c; c += kLine) {
      __builtin_prefetch(static_cast<const T*>(g.a.data) + at + c, 0, 2);
      if (g.a.z != nullptr) __builtin_prefetch(static_cast<const T*>(g.a.z) + at + c, 0, 2);
    }
  }
};

// A unit's tiles in nearly equal register tiles.
template <class D, int kTile>
struct RegisterTiles {
  int64_t count, first[kMostUnitTiles + 1];
  Multiply<D> multiply[kMostUnitTiles];
  RegisterTiles(int64_t tiles, int vectors) : count((tiles + kTile - 1) / kTile) {
    for (int64_t i = 0; i <= count; ++i) first[i] = tiles * i / count;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t rows = first[i + 1] - first[i];
      multiply[i] = vectors == 1 ? multiply_rows<D, kTile, 1>(rows) : multiply_rows<D, kTile, 2>(rows);
    }
  }
};

// A share of the weight's next plane for register tile `i` of a unit's `count`.
template <class D>
inline Ahead weight_ahead(const ConvArgs& g, const typename D::C* next, int64_t count, int64_t i) {
  const int64_t step = g.vectors * D::Ops::kWidth * static_cast<int64_t>(sizeof(typename D::C)) / count;
  return {reinterpret_cast<const char*>(next) + i * g.a.c * step, step};
}

// What is brought nearer between the products of one panel: what the epilogue will write and read, and with the unit's
// last panel the input of the next unit. Both otherwise come in bursts that nothing hides.
template <class T, class F>
inline void prefetch_share(const ConvArgs& g, int64_t point, const PanelSpan& span, const UnitPixels& at,
                           const UnitInput<T>& ahead, const F& finish) {
  const auto share = [&](int64_t count) { return count * point / kPoints; };
  const auto next = [&](int64_t count) { return count * (point + 1) / kPoints; };
  for (int64_t i = share(at.tiles * 16); i < next(at.tiles * 16); ++i) {
    if (!at.inside(i)) continue;
    finish.prefetch(span, at.pixel + i, 1);
  }
  for (int64_t i = share(ahead.count); i < next(ahead.count); ++i) ahead.prefetch(g, i);
}

template <class D, class T, int kTile, class F>
inline void run_winograd(const ConvArgs& g, int64_t begin, int64_t end, typename D::C* scratch, const F& finish) {
  using I = typename D::Ops;
  using C = typename D::C;
  const WinogradLayout layout(g, I::kWidth);
  const int64_t panels = (g.k + layout.panel - 1) / layout.panel, blocks = pack_blocks(g.a.c);
  const int64_t plane = weight_plane(g.a.c, layout.panel);
  C *lines = scratch, *v = lines + layout.lines, *m = v + layout.v;
  TapOffsets tap;
  tap.rows = tap.cols = 1;
  UnitPixels at;
  UnitInput<T> ahead;
  int64_t loaded = -1, placed = -1;
  bool safe = true;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t unit = item / g.splits, part = item % g.splits, last = panels * (part + 1) / g.splits - 1;
    const RegisterTiles<D, kTile> tiles(first_tile(g, unit + 1) - first_tile(g, unit), g.vectors);
    if (placed != unit) at.fill(g, unit);
    placed = unit;
    for (int64_t index = panels * part / g.splits; index <= last; ++index) {
      if (loaded != unit) {
        with_operand<I, T>(
            g.a, [&](const auto& operand) { safe = transform_unit<I>(g, layout, unit, 0, g.a.c, operand, lines, v); });
        loaded = unit;
      }
      ahead.count = 0;
      if (index == last && item + 1 < end && (item + 1) / g.splits != unit) ahead.fill(g, unit + 1);
      const int64_t first = index * layout.panel;
      const PanelSpan span{first, g.k - first < layout.panel ? g.k - first : layout.panel};
      bool transform = safe;
      for (int64_t i = 0; i < blocks; ++i) transform = transform && g.raw->unsafe[index * blocks + i] == 0;
      PanelSums<I> sums;
      finish.start(&sums);
      if (transform) {
        const C* b = static_cast<const C*>(g.weight) + index * kPoints * plane;
        for (int64_t p = 0; p < kPoints; ++p) {
          prefetch_share(g, p, span, at, ahead, finish);
          for (int64_t i = 0; i < tiles.count; ++i) {
            tiles.multiply[i](tap, v + p * layout.v_plane + tiles.first[i] * layout.channels, layout.channels,
                              b + p * plane, g.a.c, m + p * layout.m_plane + tiles.first[i] * layout.panel,
                              weight_ahead<D>(g, b + (p + 1) * plane, tiles.count, i));
          }
        }
        finish_unit<I>(g, layout, at, span, m, finish, &sums);
      } else {
        direct_unit<D, T, kTile>(g, layout, unit, span, v, finish, &sums);
        if (safe) loaded = -1;  // it wrote where the transformed input was
      }
      finish.finish(span, unit, sums);
    }
  }
}

template <class D, class T, int kTile>
inline void winograd(const ConvArgs& g, int64_t begin, int64_t end, void* scratch) {
  with_epilogue<typename D::Ops, T>(g, [&](const auto& finish) {
    run_winograd<D, T, kTile>(g, begin, end, static_cast<typename D::C*>(scratch), finish);
  });
}
