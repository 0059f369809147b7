// The stem, backward: dq = sum of dy over the windows that a pixel won, g = dq * act'(pre), then as batch norm's
// backward:
//
//   reduce   sums of g, g * (x - mean), and prelu's dq * pre where pre <= 0, per chunk
//   apply    dx = g * scale [+ (x - mean) * b + c]
//
// Mapping: quads, window.cuh. A quad's four pixels take their gradients from the same four windows, so each window is
// read four times in all (from cache), and no thread has other work than its neighbours. Pixels are visited whether or
// not they won: apply must write them, and reduce then sees a derivative that is not finite as apply does. Order of the
// sum: window rows, then columns. Sums are in the stat dtype over a chunk, added over the block in a fixed order;
// partials: batch_norm/finalize.cuh. Each pass reads x, dy and the taps once from memory; apply writes dx.
#pragma once

#include "batch_norm/finalize.cuh"
#include "pool/forward.cuh"

namespace fused_resnet::cuda {

template <class T>
struct StemBackwardArgs {
  using S = Stat<T>;
  StemTile stem;
  const T *dy, *x;
  const uint8_t* argmax;
  NormView<S> norm;
  ActView<S> act;
  S* partials;  // reduce
  bool sum_slope;
  ChainView<S> chain;  // apply
  T* dx;
};

inline constexpr uint8_t kNoTap = 0xff;

// Blocks that share a multiprocessor: two where the registers of eight channels' parameters and sums allow it.
template <class T, Layout kLayout, bool kVector, ActClass kClass, bool kReduce>
inline constexpr int kStemBlocks =
    kLayout == Layout::kNHWC ? (sizeof(T) == 2 && kVector && (!kReduce || kClass == ActClass::kClip) ? 2 : 1)
    : sizeof(T) == 8 || (sizeof(T) == 4 && !kVector) ? 1
                                                     : 2;

// dy and taps of the windows around a quad: NHWC 8 channels each of windows [row][column].
template <class T, bool kVector>
struct QuadWindows {
  Group<T> dy[2][2];
  uint64_t tap[2][2];

  FR_DEVICE QuadWindows(const StemBackwardArgs<T>& a, const StemCursor<Layout::kNHWC>& at, int count) {
    const StemTile& s = a.stem;
    FR_UNROLL
    for (int p = 0; p < 2; ++p) {
      FR_UNROLL
      for (int q = 0; q < 2; ++q) {
        // Past the edge: the window before it, which nobody there has won.
        const int64_t i = clamp_to(at.row + p, s.oh - 1), j = clamp_to(at.column + q, s.ow - 1), from = at.out(s, i, j);
        dy[p][q] = load_group<kVector>(a.dy + from, count);
        const uint64_t taps = load_bytes<kVector>(a.argmax + from, count, kNoTap);
        tap[p][q] = i < at.row + p || j < at.column + q ? ~uint64_t{0} : taps;
      }
    }
  }
  // dq of pixel (row, column) of the quad.
  FR_DEVICE void gather(int row, int column, Stat<T> (&dq)[kGroup]) const {
    FR_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      dq[j] = 0;
      FR_UNROLL
      for (int p = 0; p <= row; ++p) {
        FR_UNROLL
        for (int q = 0; q <= column; ++q) {
          const bool won = byte_of(tap[p][q], j) == 3 * (row + 1 - 2 * p) + (column + 1 - 2 * q);
          dq[j] += won ? dy[p][q][j] : Stat<T>(0);
        }
      }
    }
  }
};

// The same for 8 quads beside each other, NCHW: 9 windows a row.
template <class T, bool kVector>
struct RowWindows {
  Group<T> dy[2];
  Stat<T> dy_right[2];
  uint64_t tap[2];
  int tap_right[2];

  FR_DEVICE RowWindows(const StemBackwardArgs<T>& a, const StemCursor<Layout::kNCHW>& at, int count) {
    const StemTile& s = a.stem;
    FR_UNROLL
    for (int p = 0; p < 2; ++p) {
      const int64_t i = clamp_to(at.row + p, s.oh - 1), from = at.out(s, i, at.column);
      const bool below = i < at.row + p, more = !below && at.column + kGroup < s.ow;
      dy[p] = load_group<kVector>(a.dy + from, count);
      const uint64_t taps = load_bytes<kVector>(a.argmax + from, count, kNoTap);
      tap[p] = below ? ~uint64_t{0} : taps;
      dy_right[p] = more ? to_stat(a.dy[from + kGroup]) : Stat<T>(0);
      tap_right[p] = more ? a.argmax[from + kGroup] : kNoTap;
    }
  }
  // dq of the 8 pixels of half a row: columns 8 * half .. 8 * half + 7 of the quads' 16.
  FR_DEVICE void gather(int row, int half, Stat<T> (&dq)[kGroup]) const {
    FR_UNROLL
    for (int e = 0; e < kGroup; ++e) {
      const int quad = 4 * half + e / 2, column = e % 2;
      dq[e] = 0;
      FR_UNROLL
      for (int p = 0; p <= row; ++p) {
        FR_UNROLL
        for (int q = 0; q <= column; ++q) {
          const bool last = quad + q == kGroup;
          const int winner = last ? tap_right[p] : byte_of(tap[p], last ? 0 : quad + q);
          const Stat<T> from = last ? dy_right[p] : dy[p][last ? 0 : quad + q];
          dq[e] += winner == 3 * (row + 1 - 2 * p) + (column + 1 - 2 * q) ? from : Stat<T>(0);
        }
      }
    }
  }
};

// Calls f(offset in x, values there, x, dq) for the four groups of pixels of this thread's quads.
template <class T, Layout kLayout, bool kVector, class F>
FR_DEVICE void for_quads(const StemBackwardArgs<T>& a, const StemCursor<kLayout>& at, int64_t channel, F f) {
  constexpr bool kNhwc = kLayout == Layout::kNHWC;
  const StemTile& s = a.stem;
  const int windows = group_count(kNhwc ? s.tile.channels - channel : s.ow - at.column);
  // Parts of a row: NHWC columns of the quad, NCHW halves of 8 pixels. Past the edge the pixel before stands in, so
  // that all loads can start without asking.
  const auto column_of = [&](int part) { return 2 * at.column + (kNhwc ? part : part * kGroup); };
  const auto load = [&](int row, int part) {
    const int64_t i = clamp_to(2 * at.row + row, s.h - 1), j = column_of(part);
    return load_group<kVector>(a.x + at.in(s, i, kNhwc ? clamp_to(j, s.w - 1) : j),
                               kNhwc ? windows : group_count(s.w - j));
  };
  constexpr bool kAhead = sizeof(T) <= 4;
  Group<T> x[2][2];
  if constexpr (kAhead) {
    FR_UNROLL
    for (int i = 0; i < 4; ++i) x[i / 2][i % 2] = load(i / 2, i % 2);
  }
  const std::conditional_t<kNhwc, QuadWindows<T, kVector>, RowWindows<T, kVector>> around(a, at, windows);
  FR_UNROLL
  for (int row = 0; row < 2; ++row) {
    FR_UNROLL
    for (int part = 0; part < 2; ++part) {
      const int64_t i = 2 * at.row + row, j = column_of(part);
      if (i >= s.h || j >= s.w) continue;
      if constexpr (!kAhead) x[row][part] = load(row, part);
      Stat<T> dq[kGroup];
      around.gather(row, part, dq);
      f(at.in(s, i, j), kNhwc ? windows : group_count(s.w - j), x[row][part], dq);
    }
  }
}

template <class T, Layout kLayout, bool kVector, ActClass kClass>
__global__ void __launch_bounds__(kThreads, kStemBlocks<T, kLayout, kVector, kClass, true>)
    stem_reduce_kernel(StemBackwardArgs<T> a) {
  using S = Stat<T>;
  const StemTile& s = a.stem;
  const BlockPlace block(s.tile, false);
  const ThreadPlace<kLayout> thread(s.tile, block);
  const StemNorm<S, kLayout, kVector> of(a.norm, a.act, s.tile, thread.channel);
  S sum_g[kGroup] = {}, sum_gx[kGroup] = {}, sum_slope[kGroup] = {};
  for (StemCursor<kLayout> at(s, block, thread); at.inside(); at.advance(s)) {
    for_quads<T, kLayout, kVector>(a, at, thread.channel, [&](int64_t, int count, const Group<T>& x, S(&g)[kGroup]) {
      S centred[kGroup], pre[kGroup];
      FR_UNROLL
      for (int j = 0; j < kGroup; ++j) {
        centred[j] = of.norm.centred(x[j], j);
        pre[j] = of.norm.affine(centred[j], j);
        if (kClass == ActClass::kSlope && a.sum_slope && (kVector || j < count))
          sum_slope[j] += pre[j] > S(0) ? S(0) : g[j] * pre[j];
      }
      act_gradient<kClass>(a.act.kind, pre, of.slope, g);
      FR_UNROLL
      for (int j = 0; j < kGroup; ++j) {
        if (!kVector && j >= count) continue;
        sum_g[j] += g[j];
        sum_gx[j] = fma(g[j], centred[j], sum_gx[j]);
      }
    });
  }
  const Tile& t = s.tile;
  S* const out = a.partials + block.chunk * kSums * t.padded;
  store_sums<S, kLayout>(t, block, thread, sum_g, out + kSumG * t.padded);
  store_sums<S, kLayout>(t, block, thread, sum_gx, out + kSumGX * t.padded);
  if constexpr (kClass == ActClass::kSlope) {
    if (a.sum_slope) store_sums<S, kLayout>(t, block, thread, sum_slope, out + kSumSlope * t.padded);
  }
}

template <class T, Layout kLayout, bool kVector, ActClass kClass>
__global__ void __launch_bounds__(kThreads, kStemBlocks<T, kLayout, kVector, kClass, false>)
    stem_apply_kernel(StemBackwardArgs<T> a) {
  using S = Stat<T>;
  const StemTile& s = a.stem;
  const BlockPlace block(s.tile, true);
  const ThreadPlace<kLayout> thread(s.tile, block);
  const StemNorm<S, kLayout, kVector> of(a.norm, a.act, s.tile, thread.channel);
  const Chain<S, kLayout, kVector> chain(a.chain, s.tile, thread.channel);
  for (StemCursor<kLayout> at(s, block, thread); at.inside(); at.advance(s)) {
    for_quads<T, kLayout, kVector>(a, at, thread.channel, [&](int64_t to, int count, const Group<T>& x, S(&g)[kGroup]) {
      S centred[kGroup], pre[kGroup];
      FR_UNROLL
      for (int j = 0; j < kGroup; ++j) {
        centred[j] = of.norm.centred(x[j], j);
        pre[j] = of.norm.affine(centred[j], j);
      }
      act_gradient<kClass>(a.act.kind, pre, of.slope, g);
      FR_UNROLL
      for (int j = 0; j < kGroup; ++j) g[j] = chain.through(g[j], of.norm.scale(j), centred[j], j);
      store_group<kVector>(a.dx + to, g, count);
    });
  }
}

}  // namespace fused_resnet::cuda
