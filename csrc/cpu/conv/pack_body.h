// Operand and weights as the register tile wants to read them. Included inside an unnamed namespace.
#pragma once

#include "conv/operand_body.h"
#include "simd/transpose.h"

// What one unit of work needs of the operand: rows and columns of it, packed or in place.
struct Patch {
  int64_t images, image, j0, j1, i0, i1;  // of the unit: images, and positions [j0, j1) x [i0, i1)
  int64_t row0, col0;                     // operand row and column of the first packed pixel
  int64_t rows, cols;                     // packed extents
  int64_t row_step, col_step;             // operand rows and columns from one packed one to the next
  int64_t step_h, step_w;                 // packed rows and columns from one position to the next
};

// Taps are in rising order. With one tap in a direction, what a stride skips is not packed.
inline Patch patch_of(const ConvArgs& g, int64_t unit) {
  const int64_t across = (g.ow + g.block_w - 1) / g.block_w, down = (g.oh + g.block_h - 1) / g.block_h;
  Patch p;
  p.i0 = unit % across * g.block_w;
  p.j0 = unit / across % down * g.block_h;
  p.image = unit / across / down * g.images;
  p.images = g.a.n - p.image < g.images ? g.a.n - p.image : g.images;
  p.i1 = p.i0 + g.block_w < g.ow ? p.i0 + g.block_w : g.ow;
  p.j1 = p.j0 + g.block_h < g.oh ? p.j0 + g.block_h : g.oh;
  const auto extent = [](int64_t positions, int64_t step, int taps, const int64_t* tap, int64_t* packed,
                         int64_t* packed_step, int64_t* skip) {
    const bool skips = taps <= 1;
    *packed = skips ? positions : (positions - 1) * step + tap[taps - 1] - tap[0] + 1;
    *packed_step = skips ? 1 : step;
    *skip = skips ? step : 1;
  };
  extent(p.j1 - p.j0, g.step_h, g.rows, g.row_tap, &p.rows, &p.step_h, &p.row_step);
  extent(p.i1 - p.i0, g.step_w, g.cols, g.col_tap, &p.cols, &p.step_w, &p.col_step);
  if (g.planes > 1) {
    p.cols = (p.cols + g.planes - 1) / g.planes * g.planes;
    p.step_w = 1;
  }
  p.row0 = p.j0 * g.step_h + (g.rows > 0 ? g.row_tap[0] : 0);
  p.col0 = p.i0 * g.step_w + (g.cols > 0 ? g.col_tap[0] : 0);
  return p;
}

template <class C>
inline void set_zero(C* p, int64_t count) {
  __builtin_memset(p, 0, static_cast<uint64_t>(count) * sizeof(C));
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return to_float(x); }
inline float widen(Float16 x) { return to_float(x); }

// A few elements; converted where the compute type is another. Floats may become bfloat16.
template <class C, class T>
FR_INLINE inline void put(C* to, const T* from, int64_t count) {
  if constexpr (sizeof(C) == sizeof(T)) {
    __builtin_memcpy(to, from, static_cast<uint64_t>(count) * sizeof(C));
  } else if constexpr (sizeof(C) < sizeof(T)) {
    for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
  }
}

// Pixels of a few channels one after another, each padded with zeros.
template <class C, class T>
inline void copy_pixels(C* to, const T* from, int64_t count, int64_t c, int64_t pad) {
  int64_t i = 0;
  if (sizeof(C) == sizeof(T) && c == pad) {
    __builtin_memcpy(to, from, static_cast<uint64_t>(count * c) * sizeof(C));
    return;
  }
  if constexpr (sizeof(C) == 2 && sizeof(T) == 2) {
    // Images of three colours: four elements at once, of which the last is the next pixel's.
    for (; c == 3 && pad == 4 && i + 1 < count; ++i) {
      uint64_t pixel;
      __builtin_memcpy(&pixel, from + i * 3, sizeof(pixel));
      pixel &= 0xffffffffffff;
      __builtin_memcpy(to + i * 4, &pixel, sizeof(pixel));
    }
  }
  for (; i < count; ++i) {
    put(to + i * pad, from + i * c, c);
    for (int64_t j = c; j < pad; ++j) to[i * pad + j] = {};
  }
}

// The pixels of a patch, [row][column][image][c_padded], columns of one remainder by `planes` after another: zero(at,
// count) for elements outside the operand, and copy(at, pixel, count) for pixels of c_padded elements inside. They lie
// patch_pitch() elements apart in the patch, and patch_step() pixels in the operand.
inline int64_t patch_pitch(const ConvArgs& g, const Patch& p) { return p.images * g.c_padded; }
inline int64_t patch_step(const ConvArgs& g, const Patch& p) { return p.col_step * g.planes; }
template <class Z, class F>
FR_INLINE inline void for_patch(const ConvArgs& g, const Patch& p, Z zero, F copy) {
  const int64_t pixel = patch_pitch(g, p), step = patch_step(g, p), count = p.cols / g.planes;
  for (int64_t y = 0; y < p.rows; ++y) {
    const int64_t row = p.row0 + y * p.row_step, line = y * p.cols * pixel;
    if (row < 0 || row >= g.a.h) {
      zero(line, p.cols * pixel);
      continue;
    }
    for (int64_t plane = 0; plane < g.planes; ++plane) {
      const int64_t first = p.col0 + plane * p.col_step, at = line + plane * count * pixel;
      // Columns [begin, end) of the plane are inside.
      const int64_t before = first < 0 ? (-first + step - 1) / step : 0, begin = before < count ? before : count;
      const int64_t whole = first < g.a.w ? (g.a.w - first + step - 1) / step : 0;
      const int64_t end = whole < begin ? begin : whole < count ? whole : count;
      if (begin > 0) zero(at, begin * pixel);
      for (int64_t m = 0; m < p.images && begin < end; ++m) {
        copy(at + begin * pixel + m * g.c_padded, ((p.image + m) * g.a.h + row) * g.a.w + first + begin * step,
             end - begin);
      }
      if (end < count) zero(at + end * pixel, (count - end) * pixel);
    }
  }
}

// Two vectors of an operand. Where they become bfloat16, the products take denormals for zero: so may this.
template <class D>
FR_INLINE inline void put_two(typename D::C* to, typename D::Ops::V a, typename D::Ops::V b) {
  using I = typename D::Ops;
  if constexpr (D::kPair > 1) {
    I::store2_normal(to, a, b);
  } else {
    I::store(to, a);
    I::store(to + I::kWidth, b);
  }
}

// `count` pixels, `step` apart in the operand, of `padded` elements and `pitch` apart in the patch.
template <class D, class O>
FR_INLINE inline void pack_pixels(const O& operand, int64_t pixel, int64_t step, int64_t count, int64_t padded,
                                  int64_t pitch, typename D::C* to) {
  using I = typename D::Ops;
  constexpr int64_t kWidth = I::kWidth, kTwo = 2 * kWidth;
  const int64_t c = operand.channels, whole = c / kTwo * kTwo;
  for (int64_t column = 0; column < whole; column += kTwo) {
    const auto first = operand.terms(column), second = operand.terms(column + kWidth);
    for (int64_t i = 0; i < count; ++i) operand.prefetch(pixel + (count + i) * step, column);
    for (int64_t i = 0; i < count; ++i) {
      put_two<D>(to + i * pitch + column, operand.at(first, pixel + i * step, column, kWidth),
                 operand.at(second, pixel + i * step, column + kWidth, kWidth));
    }
  }
  for (int64_t i = 0; i < count && whole < padded; ++i) {
    for_columns<kWidth>(whole, c, [&](int64_t column, int64_t n) FR_INLINE {
      write<I>(to + i * pitch + column, operand.at(pixel + i * step, column, n), n);
    });
    for (int64_t j = c; j < padded; ++j) to[i * pitch + j] = {};
  }
}

template <class D, class O>
inline void pack_patch(const ConvArgs& g, const Patch& p, const O& operand, typename D::C* out) {
  // A few pixels at a time: what belongs to channels is loaded once for them, and memory is still read as it lies.
  constexpr int64_t kPixels = 8;
  const int64_t c = g.a.c, padded = g.c_padded, pitch = patch_pitch(g, p), step = patch_step(g, p);
  const bool same = sizeof(typename D::C) == sizeof(*operand.data);
  const bool copies = O::kCopies && operand.mask == nullptr && (same || c < D::Ops::kWidth);
  const bool dense = pitch == padded && step == 1;
  const auto zero = [&](int64_t at, int64_t count) FR_INLINE { set_zero(out + at, count); };
  for_patch(g, p, zero, [&](int64_t at, int64_t pixel, int64_t count) FR_INLINE {
    if (copies && dense) return copy_pixels(out + at, operand.data + pixel * c, count, c, padded);
    if (copies) {
      for (int64_t i = 0; i < count; ++i) {
        copy_pixels(out + at + i * pitch, operand.data + (pixel + i * step) * c, 1, c, padded);
      }
      return;
    }
    for (int64_t i = 0; i < count; i += kPixels) {
      const int64_t some = count - i < kPixels ? count - i : kPixels;
      pack_pixels<D>(operand, pixel + i * step, step, some, padded, pitch, out + at + i * pitch);
    }
  });
}

#include "conv/fold_body.h"

// Filters [f0, f1) and channels [c0, c1) of one tap of one panel, element by element: eight filters and one cache line
// at a time, because filters often lie a power of two apart.
template <class D, class T>
inline void pack_elements(const T* tap, int64_t stride_out, int64_t stride_in, int64_t f0, int64_t f1, int64_t c0,
                          int64_t c1, int64_t panel, typename D::C* to) {
  constexpr int64_t kPair = D::kPair, kFilters = 8, kChannels = 16;
  for (int64_t f = f0; f < f1; f += kFilters) {
    const int64_t f_end = f1 - f < kFilters ? f1 : f + kFilters;
    for (int64_t block = c0; block < c1; block += kChannels) {
      const int64_t c_end = c1 - block < kChannels ? c1 : block + kChannels;
      for (int64_t c = block; c < c_end; c += kPair) {
        typename D::C* row = to + c * panel;
        if (stride_in == 1 && c + kPair <= c_end) {
          for (int64_t i = f; i < f_end; ++i) put(row + i * kPair, tap + i * stride_out + c, kPair);
        } else {
          for (int64_t i = f; i < f_end; ++i) {
            for (int64_t j = 0; j < kPair && c + j < c_end; ++j) {
              put(row + i * kPair + j, tap + i * stride_out + (c + j) * stride_in, 1);
            }
          }
        }
      }
    }
  }
}

// A square of whole vectors: filters and contiguous channels, or pairs of them, `stride_out` apart.
template <class D, class T>
FR_INLINE inline void pack_square(const T* from, int64_t stride_out, int64_t panel, typename D::C* to) {
  using I = typename D::Ops;
  using Lanes = typename LaneTypes<I::kWidth>::V;
  Lanes row[I::kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < I::kWidth; ++i) {
    if constexpr (sizeof(T) == sizeof(typename D::C)) {
      __builtin_memcpy(&row[i], from + i * stride_out, sizeof(Lanes));
    } else if constexpr (sizeof(T) > sizeof(typename D::C)) {
      row[i] = bit_copy<Lanes>(D::rounded(from + i * stride_out));
    } else {
      row[i] = bit_copy<Lanes>(I::load(from + i * stride_out));
    }
  }
  transpose<I::kWidth>(row);
#pragma GCC unroll 16
  for (int i = 0; i < I::kWidth; ++i) __builtin_memcpy(to + i * D::kPair * panel, &row[i], sizeof(Lanes));
}

// One tap of one panel: filters [0, count), all input channels. Where channels are contiguous in the weight this is a
// transposition, in squares; where filters are (the data gradient) rows are copied. Either way what is read next lies
// far from what was read last: no hardware sees it coming.
template <class D, class T>
inline void pack_tap(const T* tap, int64_t stride_out, int64_t stride_in, int64_t count, int64_t ins, int64_t panel,
                     typename D::C* to) {
  constexpr int64_t kPair = D::kPair, kWidth = D::Ops::kWidth, kLine = 64 / sizeof(T);
  if (stride_out == 1) {
    constexpr int64_t kAhead = 16;
    for (int64_t c = 0; c < ins; c += kPair) {
      for (int64_t next = c + kAhead; next < c + kAhead + kPair && next < ins; ++next) {
        for (int64_t f = 0; f < count; f += kLine) __builtin_prefetch(tap + next * stride_in + f);
      }
      D::pack_row(tap + c * stride_in, c + 1 < ins ? stride_in : 0, count, to + c * panel);
    }
    return;
  }
  int64_t whole_f = 0, whole_c = 0;
  if constexpr (kWidth > 1 && sizeof(typename D::C) * kPair == sizeof(int32_t)) {
    if (stride_in == 1) {
      constexpr int64_t kSide = kWidth * kPair, kAhead = 4 * kLine;
      whole_f = count / kWidth * kWidth;
      whole_c = ins / kSide * kSide;
      for (int64_t c = 0; c < whole_c; c += kSide) {
        for (int64_t f = 0; f < whole_f; f += kWidth) {
          const T* from = tap + f * stride_out + c;
          for (int64_t i = 0; i < kWidth; ++i) __builtin_prefetch(from + i * stride_out + kAhead);
          pack_square<D>(from, stride_out, panel, to + c * panel + f * kPair);
        }
      }
    }
  }
  pack_elements<D>(tap, stride_out, stride_in, 0, whole_f, whole_c, ins, panel, to);
  pack_elements<D>(tap, stride_out, stride_in, whole_f, count, 0, ins, panel, to);
}

template <class D, class T>
inline void pack_panels(const ConvPackArgs& g, int64_t begin, int64_t end) {
  using C = typename D::C;
  const int64_t panel = g.vectors * D::Ops::kWidth, panels = (g.outs + panel - 1) / panel;
  const int64_t run = g.fold > 0 ? g.fold * g.ins : g.ins;
  const int64_t ins = (run + D::kStep - 1) / D::kStep * D::kStep, size = ins * panel;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = index % panels * panel, count = g.outs - first < panel ? g.outs - first : panel;
    const T* from = static_cast<const T*>(g.weight) + index / panels * g.group_stride + first * g.stride_out;
    C* to = static_cast<C*>(g.panels) + index * g.rows * g.cols * size;
    for (int t = 0; t < g.rows; ++t) {
      for (int u = 0; u < g.cols; ++u, to += size) {
        if (count < panel || ins > run) set_zero(to, size);
        if constexpr (D::kTiles) {
          if (g.fold > 0) {
            pack_weight_run<D>(g, from + g.row_index[t] * g.stride_row, count, panel, to);
            continue;
          }
        }
        pack_tap<D>(from + g.row_index[t] * g.stride_row + g.col_index[u] * g.stride_col, g.stride_out, g.stride_in,
                    count, g.ins, panel, to);
      }
    }
  }
}

template <class D, class T>
inline void pack_weight(const ConvPackArgs& g, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == 2) {
    if (g.floats) return pack_panels<D, float>(g, begin, end);
  }
  pack_panels<D, T>(g, begin, end);
}
