// Filters as Winograd wants them. Included inside an unnamed namespace.
#pragma once

#include "conv/pack_body.h"
#include "conv/winograd_transform.h"

// As many floats as doubles. Not one template: gcc 12 converts no vectors of a dependent size.
template <int kWidth>
struct WideTypes;
template <>
struct WideTypes<4> {
  typedef float F __attribute__((vector_size(16)));
  typedef double W __attribute__((vector_size(32)));
};
template <>
struct WideTypes<8> {
  typedef float F __attribute__((vector_size(32)));
  typedef double W __attribute__((vector_size(64)));
};

template <int kWidth>
struct Wide {
  using F = typename WideTypes<kWidth>::F;
  using W = typename WideTypes<kWidth>::W;
  static W load(const float* p) {
    F f;
    __builtin_memcpy(&f, p, sizeof(f));
    return __builtin_convertvector(f, W);
  }
  static void store(float* p, W w) {
    const F f = __builtin_convertvector(w, F);
    __builtin_memcpy(p, &f, sizeof(f));
  }
};
template <>
struct Wide<1> {
  using W = double;
  static W load(const float* p) { return *p; }
  static void store(float* p, W w) { *p = static_cast<float>(w); }
};

// Some filters of one channel: nine taps, `pitch` apart, become 36 points, `plane` apart.
template <int kWidth>
FR_INLINE inline void transform_filters(const float* taps, int64_t pitch, float* out, int64_t plane) {
  using W = typename Wide<kWidth>::W;
  W half[6][3];
#pragma GCC unroll 3
  for (int u = 0; u < 3; ++u) {
    W column[6];
    transform_filter<W>(Wide<kWidth>::load(taps + u * pitch), Wide<kWidth>::load(taps + (3 + u) * pitch),
                        Wide<kWidth>::load(taps + (6 + u) * pitch), column);
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) half[i][u] = column[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) {
    W row[6];
    transform_filter<W>(half[i][0], half[i][1], half[i][2], row);
#pragma GCC unroll 6
    for (int q = 0; q < 6; ++q) Wide<kWidth>::store(out + (i * 6 + q) * plane, row[q]);
  }
}

// What one item of packing reads: a panel of filters and a block of channels.
template <class T>
struct FilterBlock {
  const T* from;
  int64_t count, channels;  // filters, channels
  FilterBlock(const ConvPackArgs& g, int64_t item, int64_t panel, int64_t blocks) {
    const int64_t first = item / blocks * panel, c0 = item % blocks * kPackChannels;
    from = static_cast<const T*>(g.weight) + first * g.stride_out + c0 * g.stride_in;
    count = g.outs - first < panel ? g.outs - first : panel;
    channels = g.ins - c0 < kPackChannels ? g.ins - c0 : kPackChannels;
  }
  const T* tap(const ConvPackArgs& g, int t) const {
    return from + g.row_index[t / 3] * g.stride_row + g.col_index[t % 3] * g.stride_col;
  }
  // Filters with neighbouring channels lie pages apart: no hardware sees the next one coming.
  void prefetch(const ConvPackArgs& g, int64_t filter) const {
    if (g.stride_in != 1 || filter >= count) return;
    for (int t = 0; t < 9; ++t) {
      for (int64_t c = 0; c < channels; c += 16) __builtin_prefetch(tap(g, t) + filter * g.stride_out + c);
    }
  }
};

// Items [begin, end) of (panel, block of channels): [panel][point][channel][filter], and whether the block's weights
// are all finite and far from overflow.
template <class D, class T>
inline void pack_points(const ConvPackArgs& g, int64_t begin, int64_t end) {
  using I = typename D::Ops;
  constexpr int kWide = I::kWidth > 1 ? I::kWidth / 2 : 1, kMostPanel = 2 * I::kWidth;
  static_assert(kMostPanel <= kPackChannels);  // one filter is fetched with every channel
  const int64_t panel = g.vectors * I::kWidth, size = kPackChannels * panel;
  const int64_t blocks = pack_blocks(g.ins), plane = weight_plane(g.ins, panel);
  alignas(64) float taps[9 * kPackChannels * kMostPanel];
  for (int64_t item = begin; item < end; ++item) {
    const FilterBlock<T> block(g, item, panel, blocks), next(g, item + 1 < end ? item + 1 : item, panel, blocks);
    if (block.count < panel) set_zero(taps, 9 * size);
    for (int t = 0; t < 9; ++t) {
      pack_tap<D>(block.tap(g, t), g.stride_out, g.stride_in, block.count, block.channels, panel, taps + t * size);
    }
    auto squares = I::zero();
    for (int t = 0; t < 9; ++t) {
      for (int64_t i = 0; i < block.channels * panel; i += I::kWidth) {
        const auto w = I::load(taps + t * size + i);
        squares = I::fma(w, w, squares);
      }
    }
    g.unsafe[item] = !(I::sum(squares) <= kMostSquares);
    float* to = static_cast<float*>(g.panels) + item / blocks * kPoints * plane + item % blocks * size;
    for (int64_t c = 0; c < block.channels; ++c) {
      next.prefetch(g, c);
      for (int64_t i = c * panel; i < (c + 1) * panel; i += kWide) {
        transform_filters<kWide>(taps + i, size, to + i, plane);
      }
    }
  }
}

template <class D, class T>
inline void winograd_pack(const ConvPackArgs& g, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == 2) {
    if (g.floats) return pack_points<D, float>(g, begin, end);
  }
  pack_points<D, T>(g, begin, end);
}
