// Convolution of floats through AMX tiles of bfloat16: as kernel_body.h, with every float split into parts as it is
// packed. Included inside an unnamed namespace.
#pragma once

#include "conv/kernel_body.h"
#include "simd/amx_split.h"

using WholeDot = RealDot<Avx512Float, kChain>;
// Positions of a register tile.
constexpr int kWholeTile = 14, kSplitTile = 32;

// As pack_pixels, for parts that lie `part` apart.
template <int kParts, class O>
inline void split_pixels(const O& operand, int64_t pixel, int64_t step, int64_t count, int64_t padded, int64_t pitch,
                         int64_t part, BFloat16* to, Magnitudes& all_seen) {
  constexpr int64_t kWidth = Avx512Float::kWidth, kTwo = 2 * kWidth;
  const int64_t c = operand.channels, whole = c / kTwo * kTwo;
  Magnitudes seen = all_seen;  // where stores of vectors cannot change it
  for (int64_t column = 0; column < whole; column += kTwo) {
    const auto first = operand.terms(column), second = operand.terms(column + kWidth);
    for (int64_t i = 0; i < count; ++i) {
      operand.prefetch(pixel + (count + i) * step, column);
      operand.prefetch(pixel + (count + i) * step, column + kWidth);
    }
    for (int64_t i = 0; i < count; ++i) {
      const auto v = operand.at(first, pixel + i * step, column, kWidth);
      const auto w = operand.at(second, pixel + i * step, column + kWidth, kWidth);
      seen.add(v);
      seen.add(w);
      split_channels<kParts>(v, w, part, to + i * pitch + column);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t column = whole; column < padded; column += kWidth) {
      const int64_t n = c - column < kWidth ? c - column : kWidth;
      const auto v = n > 0 ? element<Avx512Float>(operand, pixel + i * step, column, n) : Avx512Float::zero();
      seen.add(v);
      split_channels<kParts>(v, part, to + i * pitch + column);
    }
  }
  all_seen = seen;
}

// Packs the patch of a unit, [part][row][column][image][channel], and returns the smallness of what it packed.
template <int kParts, class O>
inline int pack_split_patch(const ConvArgs& g, const Patch& p, const O& given, BFloat16* out) {
  constexpr int64_t kPixels = 8;  // as in pack_patch
  const O operand = given;
  const int64_t part = p.rows * p.cols * p.images * g.c_padded, padded = g.c_padded;
  const int64_t pitch = patch_pitch(g, p), step = patch_step(g, p);
  Magnitudes seen;
  for_patch(
      g, p,
      [&](int64_t at, int64_t count) {
        for (int i = 0; i < kParts; ++i) set_zero(out + i * part + at, count);
      },
      [&](int64_t at, int64_t pixel, int64_t count) FR_INLINE {
        for (int64_t i = 0; i < count; i += kPixels) {
          const int64_t some = count - i < kPixels ? count - i : kPixels;
          split_pixels<kParts>(operand, pixel + i * step, step, some, padded, pitch, part, out + at + i * pitch, seen);
        }
      });
  return seen.smallness();
}

// Panels [begin, end), and how small the weights of each get.
inline void pack_split_weight(const ConvPackArgs& g, int64_t begin, int64_t end) {
  constexpr int64_t kWidth = Avx512Float::kWidth;
  const int64_t panel = g.vectors * kWidth, part = kSplitStep * panel;
  const int64_t steps = (g.ins + kSplitStep - 1) / kSplitStep;
  alignas(64) float rows[kSplitStep * 2 * kWidth];
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = index * panel, count = g.outs - first < panel ? g.outs - first : panel;
    const float* from = static_cast<const float*>(g.weight) + first * g.stride_out;
    BFloat16* to = static_cast<BFloat16*>(g.panels) + index * g.rows * g.cols * steps * g.split * part;
    Magnitudes seen;
    for (int64_t tap = 0; tap < int64_t{g.rows} * g.cols; ++tap) {
      const float* at = from + g.row_index[tap / g.cols] * g.stride_row + g.col_index[tap % g.cols] * g.stride_col;
      for (int64_t step = 0; step < steps; ++step, to += g.split * part) {
        const int64_t c0 = step * kSplitStep, channels = g.ins - c0 < kSplitStep ? g.ins - c0 : kSplitStep;
        if (count < panel || channels < kSplitStep) set_zero(rows, part);
        pack_tap<WholeDot>(at + c0 * g.stride_in, g.stride_out, g.stride_in, count, channels, panel, rows);
        for (int64_t pair = 0; pair < kSplitStep / 2; ++pair) {
          for (int64_t f = 0; f < panel; f += kWidth) {
            const float* row = rows + 2 * pair * panel + f;
            const auto low = Avx512Float::load(row), high = Avx512Float::load(row + panel);
            seen.add(low);
            seen.add(high);
            split_pairs(low, high, g.split, part, to + (pair * panel + f) * 2);
          }
        }
      }
    }
    g.unsafe[index] = static_cast<uint8_t>(seen.smallness());
  }
}

// A panel's weights from their three parts, of which they are the sum, as pack_weight would pack them.
inline void join_parts(const ConvArgs& g, const SplitLayout& at, const BFloat16* parts, float* panel) {
  constexpr int64_t kWidth = Avx512Float::kWidth;
  const int64_t part = kSplitStep * at.panel, each = g.group_c / kSplitStep;
  for (int64_t tap = 0; tap < int64_t{g.rows} * g.cols; ++tap) {
    for (int64_t c = 0; c < g.a.c; c += 2) {
      const BFloat16* from = parts + (tap * each + c / kSplitStep) * at.step_size + c % kSplitStep * at.panel;
      float* to = panel + (tap * g.a.c + c) * at.panel;
      for (int64_t f = 0; f < at.panel; f += kWidth) {
        Avx512Float::V low, high;
        join_pairs(from + 2 * f, part, &low, &high);
        Avx512Float::store(to + f, low);
        if (c + 1 < g.a.c) Avx512Float::store(to + at.panel + f, high);
      }
    }
  }
}

// One panel of a unit whose values cannot be split: in floats, as the kernel without tiles does it. Rare, so everything
// is packed when it is needed, over the split patch.
template <class F>
inline void whole_panel(const ConvArgs& g, const Patch& p, const SplitLayout& at, int64_t index, const PanelSpan& span,
                        float* panel, float* patch, const F& finish, PanelSums<Avx512Float>* sums) {
  ConvPackArgs w = *g.raw;
  if (w.weight == nullptr) {
    join_parts(g, at, static_cast<const BFloat16*>(g.weight) + index * at.steps * at.step_size, panel);
  } else {
    w.weight = static_cast<const float*>(w.weight) + span.column * w.stride_out;
    w.outs = span.count;
    w.panels = panel;
    pack_weight<WholeDot, float>(w, 0, 1);
  }
  ConvArgs whole = g;
  whole.group_c = whole.c_padded = g.a.c;
  with_operand<Avx512Float, float>(g.a, [&](const auto& operand) { pack_patch<WholeDot>(whole, p, operand, patch); });
  const View<float> v = view_of<float>(whole, p, patch);
  NoState state;
  for_tiles<kWholeTile>(g, p, [&](int64_t j, int64_t, int64_t u, int64_t rows, const int64_t* pixel) {
    alignas(64) float values[kWholeTile * 2 * Avx512Float::kWidth];
    multiply_tile<WholeDot, kWholeTile>(&state, g.vectors, rows, v.taps, v.data + (j - p.j0) * v.row_step + u * v.step,
                                        v.step, panel, v.channels, values, {});
    finish.tile(span, pixel, static_cast<int>(rows), values, sums);
  });
}

template <class F>
inline void run_split(const ConvArgs& g, int64_t begin, int64_t end, char* scratch, const F& finish) {
  using Sums = PanelSums<Avx512Float>;
  const SplitLayout at(g, Avx512Float::kWidth);
  Sums* sums = reinterpret_cast<Sums*>(scratch);
  float* partial = reinterpret_cast<float*>(scratch + at.partial);
  float* panel = reinterpret_cast<float*>(scratch + at.whole);
  BFloat16* patch = reinterpret_cast<BFloat16*>(scratch + at.patch);
  const MultiplySplit multiply = multiply_split_for(g.vectors, g.split);
  int64_t packed = -1;
  int smallness = 0;
  AmxState state;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t unit = item / g.splits, share = item % g.splits;
    const Patch p = patch_of(g, unit);
    if (packed != unit && g.rows > 0) {
      with_operand<Avx512Float, float>(g.a, [&](const auto& operand) {
        smallness =
            g.split == 3 ? pack_split_patch<3>(g, p, operand, patch) : pack_split_patch<2>(g, p, operand, patch);
      });
      packed = unit;
    }
    const View<BFloat16> v = view_of<BFloat16>(g, p, patch);
    const int64_t length = (p.i1 - p.i0) * p.images;
    const auto span_of = [&](int64_t index) {
      const int64_t first = index * at.panel;
      return PanelSpan{first, g.k - first < at.panel ? g.k - first : at.panel};
    };
    const auto splittable = [&](int64_t index) { return smallness + g.raw->unsafe[index] <= kMostSmallness; };
    // Steps [k0, k1) of one tile and panel; the last of them finish it.
    const auto multiply_add = [&](int64_t index, int64_t k0, int64_t k1, int64_t j, int64_t u, int64_t rows,
                                  const int64_t* pixel) FR_INLINE {
      alignas(64) float values[kSplitTile * 2 * Avx512Float::kWidth];
      float* out = at.block_steps < at.steps ? partial + ((j - p.j0) * length + u) * at.panel : values;
      const PanelSpan span = span_of(index);
      if (k1 == at.steps) finish.prefetch(span, pixel, rows);
      const SplitOperand a{v.data + (j - p.j0) * v.row_step + u * v.step, p.rows * p.cols * v.pixel, v.step,
                           v.channels};
      state.set_rows(rows);
      multiply(rows, v.taps, a, static_cast<const BFloat16*>(g.weight) + index * at.steps * at.step_size, k0, k1, out);
      if (k1 == at.steps) finish.tile(span, pixel, static_cast<int>(rows), out, &sums[index]);
    };
    const int64_t first = at.panels * share / g.splits, last = at.panels * (share + 1) / g.splits;
    for (int64_t index = first; index < last; ++index) finish.start(&sums[index]);
    // As in run_items; a panel that is too large for the cache meets all tiles block by block.
    const int64_t outer = g.tiles_first ? 1 : last - first, inner = g.tiles_first ? last - first : 1;
    for (int64_t group = first; group < first + outer; ++group) {
      int64_t k0 = 0;
      do {
        const int64_t k1 = at.steps - k0 < at.block_steps ? at.steps : k0 + at.block_steps;
        for_tiles<kSplitTile>(g, p, [&](int64_t j, int64_t, int64_t u, int64_t rows, const int64_t* pixel) {
          for (int64_t index = group; index < group + inner; ++index) {
            if (splittable(index)) multiply_add(index, k0, k1, j, u, rows, pixel);
          }
        });
        k0 = k1;
      } while (k0 < at.steps);
    }
    for (int64_t index = first; index < last; ++index) {
      if (splittable(index)) continue;
      whole_panel(g, p, at, index, span_of(index), panel, reinterpret_cast<float*>(patch), finish, &sums[index]);
      packed = -1;
    }
    for (int64_t index = first; index < last; ++index) finish.finish(span_of(index), unit, sums[index]);
  }
}

inline void convolve_split(const ConvArgs& g, int64_t begin, int64_t end, void* scratch) {
  with_epilogue<Avx512Float, float>(
      g, [&](const auto& finish) { run_split(g, begin, end, static_cast<char*>(scratch), finish); });
}
