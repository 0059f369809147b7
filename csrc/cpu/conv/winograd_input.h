// From the operand to the transformed input of a unit. Included inside an unnamed namespace.
#pragma once

#include "conv/pack_body.h"
#include "conv/winograd_layout.h"
#include "conv/winograd_transform.h"

// Zero stays zero, until an element is not finite or too large to be transformed: then it is a NaN, whatever follows.
template <class I>
FR_INLINE inline typename I::V still_safe(typename I::V zero, typename I::V element) {
  return I::fma(I::mul(element, I::set1(kOverflowing)), I::zero(), zero);
}

// One column of a strip: six rows of channels [c0, c1) become six points. Tiles overlap, so this half of the transform
// is shared between neighbours.
template <class I, bool kInside, class O>
FR_INLINE inline void transform_column(const ConvArgs& g, const O& operand, int64_t pixel, int64_t row, int64_t c0,
                                       int64_t c1, int64_t plane, typename I::S* out, typename I::V (&safe)[2]) {
  const int64_t width = g.a.w, height = g.a.h;
  for_columns<I::kWidth>(c0, c1, [&](int64_t column, int64_t n) FR_INLINE {
    typename I::V d[6], v[6];
#pragma GCC unroll 6
    for (int r = 0; r < 6; ++r) {
      const bool there = kInside || (row + r >= 0 && row + r < height);
      d[r] = there ? element<I>(operand, pixel + r * width, column, n) : I::zero();
      safe[r % 2] = still_safe<I>(safe[r % 2], d[r]);
    }
    transform_input<I>(d, v);
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) I::store(out + i * plane + column - c0, v[i]);
  });
}

// Tiles [0, strip.count) of channels [c0, c1), from lines [point][column][block] to v [point][point][tile][channel],
// whose first channel is `origin`.
template <class I>
inline void transform_rows(const WinogradLayout& at, const TileStrip& strip, int64_t c0, int64_t c1, int64_t origin,
                           const typename I::S* lines, typename I::S* v) {
  // Copies: the compiler must expect that stores of vectors change whatever else is in memory.
  const int64_t block = at.block, channels = at.channels, v_plane = at.v_plane, plane = strip.width() * block;
  for (int64_t t = 0; t < strip.count; ++t) {
    for (int64_t c = c0; c < c1; c += I::kWidth) {
      const typename I::S* from = lines + t * kTileOut * block + c - c0;
      typename I::S* to = v + t * channels + c - origin;
#pragma GCC unroll 1
      for (int i = 0; i < 6; ++i, to += 6 * v_plane) {
        typename I::V d[6], p[6];
#pragma GCC unroll 6
        for (int q = 0; q < 6; ++q) d[q] = I::load(from + i * plane + q * block);
        transform_input<I>(d, p);
#pragma GCC unroll 6
        for (int q = 0; q < 6; ++q) I::store(to + q * v_plane, p[q]);
      }
    }
  }
}

// Channels [begin, end). Returns whether all values are finite and far from overflow: a unit that says no is computed
// directly, because Winograd would spread its infinities over whole tiles. Each element says so for itself, so it is
// the same answer however channels are shared out.
template <class I, class O>
inline bool transform_unit(const ConvArgs& g, const WinogradLayout& at, int64_t unit, int64_t begin, int64_t end,
                           const O& operand, typename I::S* lines, typename I::S* v) {
  typename I::V safe[2] = {I::zero(), I::zero()};
  for_strips(g, unit, [&](const TileStrip& strip, int64_t first) {
    const int64_t row = strip.row * kTileOut + g.row_tap[0], col = strip.col * kTileOut + g.col_tap[0];
    const int64_t width = strip.width(), plane = width * at.block;
    const bool inside = row >= 0 && row + kTileIn <= g.a.h;
    for (int64_t c0 = begin; c0 < end; c0 += at.block) {
      const int64_t c1 = c0 + at.block < end ? c0 + at.block : end;
      for (int64_t x = 0; x < width; ++x) {
        typename I::S* out = lines + x * at.block;
        if (col + x < 0 || col + x >= g.a.w) {
          for (int i = 0; i < 6; ++i) set_zero(out + i * plane, at.block);
          continue;
        }
        const int64_t pixel = (strip.image * g.a.h + row) * g.a.w + col + x;
        if (inside) {
          transform_column<I, true>(g, operand, pixel, row, c0, c1, plane, out, safe);
        } else {
          transform_column<I, false>(g, operand, pixel, row, c0, c1, plane, out, safe);
        }
      }
      transform_rows<I>(at, strip, c0, c1, begin, lines, v + first * at.channels);
    }
  });
  return I::sum(I::add(safe[0], safe[1])) == 0;
}
