// From the products of a unit to its positions of y. Included inside an unnamed namespace.
#pragma once

#include "conv/epilogue_body.h"
#include "conv/winograd_layout.h"
#include "conv/winograd_transform.h"

// Where the tiles of a unit lie in y.
struct UnitPixels {
  int64_t tiles = 0;
  int64_t pixel[kMostUnitTiles * 16];  // of positions outside y too
  uint8_t rows[kMostUnitTiles], cols[kMostUnitTiles];

  void fill(const ConvArgs& g, int64_t unit) {
    tiles = 0;
    for_strips(g, unit, [&](const TileStrip& strip, int64_t) {
      for (int64_t t = 0; t < strip.count; ++t, ++tiles) {
        const int64_t j0 = strip.row * kTileOut, i0 = (strip.col + t) * kTileOut;
        rows[tiles] = static_cast<uint8_t>(g.oh - j0 < kTileOut ? g.oh - j0 : kTileOut);
        cols[tiles] = static_cast<uint8_t>(g.ow - i0 < kTileOut ? g.ow - i0 : kTileOut);
        for (int64_t r = 0; r < 16; ++r) {
          pixel[tiles * 16 + r] = (strip.image * g.y_h + j0 + r / 4) * g.y_w + i0 + r % 4;
        }
      }
    });
  }
  bool inside(int64_t index) const { return index % 16 / 4 < rows[index / 16] && index % 4 < cols[index / 16]; }
};

// Sixteen positions [row][column][panel] of one tile.
template <class I, int kVectors>
FR_INLINE inline void inverse_tile(const typename I::S* m, int64_t plane, typename I::S* values) {
#pragma GCC unroll 1
  for (int j = 0; j < kVectors; ++j) {
    typename I::V half[4][6];
#pragma GCC unroll 6
    for (int q = 0; q < 6; ++q) {
      typename I::V p[6], y[4];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) p[i] = I::load(m + (i * 6 + q) * plane + j * I::kWidth);
      transform_output<I>(p, y);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) half[r][q] = y[r];
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      typename I::V y[4];
      transform_output<I>(half[r], y);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) I::store(values + ((r * 4 + i) * kVectors + j) * I::kWidth, y[i]);
    }
  }
}

template <class I, class F>
inline void finish_unit(const ConvArgs& g, const WinogradLayout& layout, const UnitPixels& at, const PanelSpan& span,
                        const typename I::S* m, const F& finish, PanelSums<I>* sums) {
  for (int64_t t = 0; t < at.tiles; ++t) {
    alignas(64) typename I::S values[16 * 2 * I::kWidth];
    const typename I::S* from = m + t * layout.panel;
    g.vectors == 1 ? inverse_tile<I, 1>(from, layout.m_plane, values)
                   : inverse_tile<I, 2>(from, layout.m_plane, values);
    const int64_t* pixel = at.pixel + t * 16;
    if (at.rows[t] == 4 && at.cols[t] == 4) {
      finish.tile(span, pixel, 16, values, sums);
    } else {
      for (int64_t r = 0; r < at.rows[t]; ++r) {
        finish.tile(span, pixel + r * 4, at.cols[t], values + r * 4 * layout.panel, sums);
      }
    }
  }
}
