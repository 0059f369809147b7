// The units of work of a convolution, one after another: have the operand packed, multiply tiles, finish them. What is
// packed and how it is multiplied is the product's. Included inside an unnamed namespace after the vector headers.
#pragma once

#include "conv/epilogue_body.h"
#include "conv/pack_body.h"

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

// f(row, tile, position, positions, their pixels of y) for every register tile of a unit.
template <int kTile, class F>
FR_INLINE inline void for_tiles(const ConvArgs& g, const Patch& p, F f) {
  const int64_t length = (p.i1 - p.i0) * p.images, tiles = (length + kTile - 1) / kTile;
  for (int64_t j = p.j0; j < p.j1; ++j) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t u = length * tile / tiles, rows = length * (tile + 1) / tiles - u;
      int64_t pixel[kTile];
      tile_pixels(g, p, j, u, rows, pixel);
      f(j, tile, u, rows, pixel);
    }
  }
}

// Positions [u, u + rows) of a unit's row j, number `tile` of its `tiles`, times a panel.
struct TileAt {
  int64_t panel, next_panel, j, u, rows, tile, tiles;
};

// A product has
//   panels()                      how many there are
//   span(panel)                   the panel's filters
//   prepare(unit, same, memory)   before a unit's tiles; `same`: the unit of the call before, still in `memory`
//   tile(at, span, pixels, finish, sums)  multiplies one register tile and has it finished
template <class I, int kTile, class P, class F>
inline void run_items(const ConvArgs& g, int64_t begin, int64_t end, char* scratch, P& product, const F& finish) {
  using Sums = PanelSums<I>;
  static_assert(sizeof(Sums) <= kPanelSumsBytes);
  Sums* sums = reinterpret_cast<Sums*>(scratch);
  const int64_t all = product.panels();
  int64_t packed = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t unit = item / g.splits, part = item % g.splits;
    const Patch p = patch_of(g, unit);
    product.prepare(p, packed == unit, scratch + all * kPanelSumsBytes);
    packed = unit;
    const int64_t first = all * part / g.splits, last = all * (part + 1) / g.splits;
    const int64_t across = ((p.i1 - p.i0) * p.images + kTile - 1) / kTile, tiles = (p.j1 - p.j0) * across;
    for (int64_t index = first; index < last; ++index) finish.start(&sums[index]);
    // Few weights stay in the second-level cache: then a tile meets all panels in turn, and pixels of y are written,
    // and what is read beside them, whole. Else a panel meets all tiles.
    const int64_t outer = g.tiles_first ? 1 : last - first, inner = g.tiles_first ? last - first : 1;
    for (int64_t group = 0; group < outer; ++group) {
      for_tiles<kTile>(g, p, [&](int64_t j, int64_t tile, int64_t u, int64_t rows, const int64_t* pixel) FR_INLINE {
        TileAt at{0, 0, j - p.j0, u, rows, (j - p.j0) * across + tile, tiles};
        for (int64_t i = 0; i < inner; ++i) {
          at.panel = first + group + i;
          at.next_panel = at.panel + 1 < last ? at.panel + 1 : first;
          const PanelSpan span = product.span(at.panel);
          finish.prefetch(span, pixel, rows);
          product.tile(at, span, pixel, finish, &sums[at.panel]);
        }
      });
    }
    for (int64_t index = first; index < last; ++index) finish.finish(product.span(index), unit, sums[index]);
  }
  if (g.stream) I::fence();
}
