// The weight gradient of a 3x3 convolution by Winograd's F(4x4, 3x3), transposed: with Y = A^T [(G g G^T) * (B^T d B)]
// A for a tile of the forward pass,
//   dg = G^T [ sum over tiles (A dY A^T) * (B^T d B) ] G
// so 36 multiplications for each tile, filter and channel instead of 144. Sums stay transformed until the last tile.
// Source: docs/convolution.md. Included inside an unnamed namespace after the vector headers.
#pragma once

#include "conv/slices.h"
#include "conv/weight_kernels.h"
#include "conv/winograd_input.h"
#include "conv/winograd_weight_layout.h"

// A y: the transpose of transform_output.
template <class I>
FR_INLINE inline void transform_gradient(const typename I::V (&y)[4], typename I::V (&u)[6]) {
  const auto even = I::add(y[0], y[2]), odd = I::add(y[1], y[3]);
  u[0] = y[0];
  u[1] = I::add(even, odd);
  u[2] = I::sub(even, odd);
  u[3] = I::fma(I::set1(0.125f), y[3], I::fma(I::set1(0.25f), y[2], I::fma(I::set1(0.5f), y[1], y[0])));
  u[4] = I::fma(I::set1(-8.0f), y[3], I::fma(I::set1(4.0f), y[2], I::fma(I::set1(-2.0f), y[1], y[0])));
  u[5] = y[3];
}

// G^T m: the transpose of transform_filter.
template <class I>
FR_INLINE inline void transform_weight(const typename I::V (&m)[6], typename I::V (&g)[3]) {
  const auto s = I::mul(I::add(m[1], m[2]), I::set1(1.0f / 3)), d = I::mul(I::sub(m[1], m[2]), I::set1(1.0f / 3));
  g[0] = I::add(I::fma(I::set1(-16.0f / 15), m[3], I::fma(I::set1(1.0f / 15), m[4], d)), m[0]);
  g[1] = I::fma(I::set1(-8.0f / 15), m[3], I::fma(I::set1(-2.0f / 15), m[4], s));
  g[2] = I::add(I::fma(I::set1(-4.0f / 15), m[3], I::fma(I::set1(4.0f / 15), m[4], d)), m[5]);
}

// Filters [begin, end) of a chunk's gradient, to u [point][point][tile][filter], and their sums to `sums`, unless it is
// null. Returns whether all values are finite and far from overflow.
template <class I, class O>
inline bool transform_gradients(const WeightArgs& p, const ConvArgs& g, const WinogradWeightLayout& at, int64_t unit,
                                int64_t begin, int64_t end, const O& operand, float* lines, float* u, float* sums) {
  const int64_t block = at.gradient_block, pitch = at.k_pitch, u_plane = at.u_plane;
  typename I::V safe[2] = {I::zero(), I::zero()};
  if (sums != nullptr) set_zero(sums, whole(end - begin, I::kWidth));
  for_strips(g, unit, [&](const TileStrip& strip, int64_t first) {
    const int64_t row = strip.row * kTileOut, col = strip.col * kTileOut, width = kTileOut * strip.count;
    const int64_t plane = width * block, below = p.dz.h - row;
    for (int64_t c0 = begin; c0 < end; c0 += block) {
      const int64_t c1 = c0 + block < end ? c0 + block : end;
      for (int64_t x = 0; x < width; ++x) {
        float* out = lines + x * block;
        if (col + x >= p.dz.w) {
          for (int i = 0; i < kTileIn; ++i) set_zero(out + i * plane, block);
          continue;
        }
        const int64_t pixel = (strip.image * p.dz.h + row) * p.dz.w + col + x;
        for_columns<I::kWidth>(c0, c1, [&](int64_t column, int64_t n) FR_INLINE {
          typename I::V y[4], t[6];
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r) {
            y[r] = r < below ? element<I>(operand, pixel + r * p.dz.w, column, n) : I::zero();
            safe[r % 2] = still_safe<I>(safe[r % 2], y[r]);
          }
          if (sums != nullptr) {
            const auto sum = I::add(I::add(y[0], y[1]), I::add(y[2], y[3]));
            I::store(sums + column - begin, I::add(I::load(sums + column - begin), sum));
          }
          transform_gradient<I>(y, t);
#pragma GCC unroll 6
          for (int i = 0; i < 6; ++i) I::store(out + i * plane + column - c0, t[i]);
        });
      }
      for (int64_t t = 0; t < strip.count; ++t) {
        for (int64_t c = c0; c < c1; c += I::kWidth) {
          const float* from = lines + t * kTileOut * block + c - c0;
          float* to = u + (first + t) * pitch + c - begin;
#pragma GCC unroll 1
          for (int i = 0; i < kTileIn; ++i, to += kTileIn * u_plane) {
            typename I::V y[4], q[6];
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) y[r] = I::load(from + i * plane + r * block);
            transform_gradient<I>(y, q);
#pragma GCC unroll 6
            for (int r = 0; r < 6; ++r) I::store(to + r * u_plane, q[r]);
          }
        }
      }
    }
  });
  return I::sum(I::add(safe[0], safe[1])) == 0;
}

// sums[filter][channel] (+)= sum over tiles of u[tile][filter] * v[tile][channel]. A chunk's tiles are summed by
// themselves first: one chain through all chunks would have more than twice the error. What lies `ahead` of u, the next
// point's, is brought nearer: its rows are too far apart for hardware to see them coming.
template <class I, int kRows, int kVectors>
inline void outer(const float* u, int64_t u_pitch, int64_t ahead, const float* v, int64_t v_pitch, int64_t tiles,
                  float* sums, bool first) {
  typename I::V sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    __builtin_prefetch(sums + i * 2 * I::kWidth, 1);
    if constexpr (kVectors * I::kWidth > kLine) __builtin_prefetch(sums + i * 2 * I::kWidth + kLine, 1);
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sum[i][j] = I::zero();
  }
  for (int64_t t = 0; t < tiles; ++t) {
    typename I::V w[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) w[j] = I::load(v + j * I::kWidth);
    __builtin_prefetch(u + ahead);
    if constexpr (kRows > 1) __builtin_prefetch(u + ahead + kRows - 1);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto x = I::set1(u[i]);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sum[i][j] = I::fma(x, w[j], sum[i][j]);
    }
    u += u_pitch;
    v += v_pitch;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      float* const at = sums + (i * 2 + j) * I::kWidth;
      I::store(at, first ? sum[i][j] : I::add(I::load(at), sum[i][j]));
    }
  }
}

using Outer = void (*)(const float*, int64_t, int64_t, const float*, int64_t, int64_t, float*, bool);

template <class I, int kTile>
inline Outer outer_of(int64_t rows, int64_t vectors) {
  if constexpr (kTile > 1) {
    if (rows < kTile) return outer_of<I, kTile - 1>(rows, vectors);
  }
  return vectors == 1 ? &outer<I, kTile, 1> : &outer<I, kTile, 2>;
}

// One block's sums of all slices, which are `slice` floats apart, to the caller's strides and dtype. kOne: one slice.
template <class I, class T, bool kOne>
inline void write_block(const WeightArgs& p, const WinogradWeightLayout& at, int64_t panel, int64_t k_tile,
                        const float* sums, int64_t slices, int64_t slice) {
  const int64_t first = first_filter(p, k_tile), last = first_filter(p, k_tile + 1), plane = at.filters * at.panel;
  const int64_t out_k = p.out_k, out_c = p.out_c, out_r = p.out_r, out_s = p.out_s;
  for (int64_t k = first; k < last; ++k) {
    for (int64_t c = panel * at.panel, j = 0; j < 2 && c < p.group_c; c += I::kWidth, ++j) {
      const float* m = sums + ((k - first) * 2 + j) * I::kWidth;
      const int64_t n = p.group_c - c < I::kWidth ? p.group_c - c : I::kWidth;
      T* const out = static_cast<T*>(p.dweight) + k * out_k + c * out_c;
      // The lines of the next filter: a store that waits for its line holds up all behind it.
      for (int tap = 0; tap < 9 && out_c == 1; ++tap) {
        __builtin_prefetch(out + out_k + tap / 3 * out_r + tap % 3 * out_s, 1);
      }
      typename I::V half[3][6];
#pragma GCC unroll 6
      for (int q = 0; q < 6; ++q) {
        typename I::V column[6], g[3];
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) {
          const float* from = m + (i * 6 + q) * plane;
          column[i] = kOne ? I::load(from) : sum_slices<I>(from, slices, slice);
        }
        transform_weight<I>(column, g);
#pragma GCC unroll 3
        for (int r = 0; r < 3; ++r) half[r][q] = g[r];
      }
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) {
        typename I::V g[3];
        transform_weight<I>(half[r], g);
#pragma GCC unroll 3
        for (int s = 0; s < 3; ++s) {
          T* to = out + r * out_r + s * out_s;
          if (out_c == 1) {
            write<I>(to, g[s], n);
          } else {
            T lanes[I::kWidth];
            I::store(lanes, g[s]);
            for (int64_t lane = 0; lane < n; ++lane) to[lane * out_c] = lanes[lane];
          }
        }
      }
    }
  }
}

template <class I, class T, bool kOne>
inline void finish_block(const WeightArgs& p, const WinogradWeightLayout& at, int64_t panel, int64_t k_tile,
                         const float* sums, int64_t slices, int64_t slice) {
  if constexpr (sizeof(T) == 2) {
    if (p.float_dweight) return write_block<I, float, kOne>(p, at, panel, k_tile, sums, slices, slice);
  }
  write_block<I, T, kOne>(p, at, panel, k_tile, sums, slices, slice);
}

// Items: a slice of the chunks, and parts of the filters' tiles and the channels' panels.
template <class I, class T, int kTile>
inline void accumulate_winograd(const WeightArgs& p, int64_t begin, int64_t end, float* scratch) {
  const ConvArgs g = winograd_forward(p);
  const WinogradWeightLayout at(p, g, I::kWidth, kTile);
  float *lines = scratch, *v = lines + at.input.lines, *u = v + at.input.v, *own = u + kPoints * at.u_plane;
  const int64_t slice_floats = at.panels * p.k_tiles * at.block;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t c_part = item % p.c_parts, k_part = item / p.c_parts % p.k_parts;
    const int64_t slice = item / p.c_parts / p.k_parts;
    const int64_t tile0 = p.k_tiles * k_part / p.k_parts, tile1 = p.k_tiles * (k_part + 1) / p.k_parts;
    const int64_t panel0 = at.panels * c_part / p.c_parts, panel1 = at.panels * (c_part + 1) / p.c_parts;
    const int64_t unit0 = p.units * slice / p.slices, unit1 = p.units * (slice + 1) / p.slices;
    const int64_t c0 = panel0 * at.panel, c1 = panel1 * at.panel < p.group_c ? panel1 * at.panel : p.group_c;
    // From and to whole vectors of filters: a mask's bits are read by bytes.
    const int64_t k0 = first_filter(p, tile0) / I::kWidth * I::kWidth;
    const int64_t last = whole(first_filter(p, tile1), I::kWidth), k1 = last < p.group_k ? last : p.group_k;
    float* const bias = p.bias_sums == nullptr || c_part > 0 ? nullptr : own + at.block;
    bool safe = true;
    for (int64_t unit = unit0; unit < unit1 && safe; ++unit) {
      const int64_t tiles = first_tile(g, unit + 1) - first_tile(g, unit);
      with_operand<I, T>(
          p.a, [&](const auto& operand) { safe = transform_unit<I>(g, at.input, unit, c0, c1, operand, lines, v); });
      with_operand<I, T>(p.dz, [&](const auto& operand) {
        safe = transform_gradients<I>(p, g, at, unit, k0, k1, operand, lines, u, bias) && safe;
      });
      for (int64_t k = first_filter(p, tile0); k < first_filter(p, tile1) && bias != nullptr; ++k) {
        double& sum = p.bias_sums[slice * p.group_k + k];
        const double chunk = static_cast<double>(bias[k - k0]);
        sum = unit == unit0 ? chunk : sum + chunk;
      }
      // Some tiles of the filters, which stay in the second-level cache while all panels of channels pass by.
      for (int64_t some = tile0; some < tile1 && safe; some += p.chunk_k) {
        const int64_t end = tile1 - some < p.chunk_k ? tile1 : some + p.chunk_k;
        for (int64_t panel = panel0; panel < panel1; ++panel) {
          const int64_t vectors = p.group_c - panel * at.panel <= I::kWidth ? 1 : 2;
          for (int64_t k_tile = some; k_tile < end; ++k_tile) {
            const int64_t first = first_filter(p, k_tile), rows = first_filter(p, k_tile + 1) - first;
            float* sums = p.units == 1 ? own
                                       : static_cast<float*>(p.sums) + slice * slice_floats +
                                             (panel * p.k_tiles + k_tile) * at.block;
            const Outer multiply = outer_of<I, kTile>(rows, vectors);
            for (int64_t point = 0; point < kPoints; ++point) {
              multiply(u + point * at.u_plane + first - k0, at.k_pitch, point + 1 < kPoints ? at.u_plane : 0,
                       v + point * at.input.v_plane + panel * at.panel - c0, at.input.channels, tiles,
                       sums + point * at.filters * at.panel, unit == unit0);
            }
            if (p.units == 1) finish_block<I, T, true>(p, at, panel, k_tile, own, 1, 0);
          }
        }
      }
    }
    p.unsafe[item] = !safe;
  }
}

template <class I, class T, int kTile>
inline void winograd_weight(const WeightArgs& p, int64_t begin, int64_t end, void* scratch) {
  if (p.pass == WeightPass::kAccumulate) {
    return accumulate_winograd<I, T, kTile>(p, begin, end, static_cast<float*>(scratch));
  }
  const WinogradWeightLayout at(p, winograd_forward(p), I::kWidth, kTile);
  const int64_t slice_floats = at.panels * p.k_tiles * at.block;
  for (int64_t i = begin; i < end; ++i) {
    const float* sums = static_cast<const float*>(p.sums) + i * at.block;
    if (p.slices == 1) {
      finish_block<I, T, true>(p, at, i / p.k_tiles, i % p.k_tiles, sums, 1, 0);
    } else {
      finish_block<I, T, false>(p, at, i / p.k_tiles, i % p.k_tiles, sums, p.slices, slice_floats);
    }
  }
}
