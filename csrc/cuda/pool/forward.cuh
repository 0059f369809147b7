// The stem, forward: y = max over the window of act((x - mean) * scale + bias), and which tap won.
//
// Mapping: window.cuh. The normalised tensor is recomputed for each window that holds a pixel, never stored: 9 taps
// from the first-level cache cost less than a pass through memory. A rising activation commutes with the maximum and is
// applied once. Taps outside the image repeat one inside, index and all: that changes neither the maximum nor who won.
// Ties: the first tap; a NaN wins, the last one over earlier ones. Nothing is summed. Reads x once from memory (9/4
// times from cache), writes y and the taps once.
#pragma once

#include "pool/window.cuh"

namespace fused_resnet::cuda {

template <class T>
struct StemForwardArgs {
  StemTile stem;
  const T* x;
  NormView<Stat<T>> norm;
  ActView<Stat<T>> act;
  T* y;
  uint8_t* argmax;  // nullable
};

// Those that rise.
template <ActClass kClass>
inline constexpr bool kRising = kClass == ActClass::kClip;

// The maxima so far of 8 windows' or 8 channels' taps.
template <class S>
struct Winners {
  S best[kGroup];
  int tap[kGroup];
  FR_DEVICE void meet(int j, S v, int index) {
    const bool wins = v > best[j] || v != v;
    best[j] = wins ? v : best[j];
    tap[j] = wins ? index : tap[j];
  }
  FR_DEVICE uint64_t taps() const {
    uint64_t bytes = 0;
    FR_UNROLL
    for (int j = 0; j < kGroup; ++j) bytes |= static_cast<uint64_t>(tap[j]) << (8 * j);
    return bytes;
  }
};

// One row of taps of 8 channels' windows.
template <class T, bool kVector, ActClass kClass, class Of>
FR_DEVICE void meet_row_nhwc(const StemForwardArgs<T>& a, const StemCursor<Layout::kNHWC>& at, int64_t ih, const Of& of,
                             int count, Winners<Stat<T>>& winners) {
  const StemTile& s = a.stem;
  const int row_tap = static_cast<int>(3 * (ih - 2 * at.row + 1));
  const auto load = [&](int kw) {
    return load_group<kVector>(a.x + at.in(s, ih, clamp_to(2 * at.column - 1 + kw, s.w - 1)), count);
  };
  const auto meet = [&](int kw, const Group<T>& x) {
    const int tap = row_tap + static_cast<int>(clamp_to(2 * at.column - 1 + kw, s.w - 1) - 2 * at.column + 1);
    Stat<T> v[kGroup];
    FR_UNROLL
    for (int j = 0; j < kGroup; ++j) v[j] = of.norm.affine(of.norm.centred(x[j], j), j);
    if constexpr (!kRising<kClass>) act_forward<kClass>(a.act.kind, of.slope, v);
    FR_UNROLL
    for (int j = 0; j < kGroup; ++j) winners.meet(j, v[j], tap);
  };
  if constexpr (sizeof(T) <= 4) {
    Group<T> x[3];
    FR_UNROLL
    for (int kw = 0; kw < 3; ++kw) x[kw] = load(kw);
    FR_UNROLL
    for (int kw = 0; kw < 3; ++kw) meet(kw, x[kw]);
  } else {  // three of them would take more registers than there are
    FR_NO_UNROLL
    for (int kw = 0; kw < 3; ++kw) meet(kw, load(kw));
  }
}

// One row of taps of 8 windows beside each other: input columns 2 * column - 1 .. 2 * column + 15.
template <class T, bool kVector, ActClass kClass, class Of>
FR_DEVICE void meet_row_nchw(const StemForwardArgs<T>& a, const StemCursor<Layout::kNCHW>& at, int64_t ih, const Of& of,
                             int count, Winners<Stat<T>>& winners) {
  using S = Stat<T>;
  constexpr int kColumns = 2 * kGroup + 1;
  const StemTile& s = a.stem;
  const int row_tap = static_cast<int>(3 * (ih - 2 * at.row + 1));
  const T* const row = a.x + at.in(s, ih, 0);
  const int64_t first = 2 * at.column;
  const Group<T> left = load_group<kVector>(row + first, group_count(s.w - first));
  const Group<T> right = load_group<kVector>(row + first + kGroup, group_count(s.w - first - kGroup));
  S v[kColumns];
  v[0] = to_stat(row[clamp_to(first - 1, s.w - 1)]);
  FR_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    v[1 + j] = left[j];
    v[1 + kGroup + j] = right[j];
  }
  FR_UNROLL
  for (int i = 0; i < kColumns; ++i) v[i] = of.norm.affine(of.norm.centred(v[i], 0), 0);
  if constexpr (!kRising<kClass>) act_forward<kClass>(a.act.kind, of.slope, v);
  FR_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    if (!kVector && j >= count) continue;
    // Left of the image stands its first column, the middle tap; right of it nothing is met.
    winners.meet(j, v[2 * j], row_tap + (first + j == 0 ? 1 : 0));
    winners.meet(j, v[2 * j + 1], row_tap + 1);
    if (kVector || first + 2 * j + 1 < s.w) winners.meet(j, v[2 * j + 2], row_tap + 2);
  }
}

template <class S, Layout kLayout, bool kVector>
struct StemNorm {
  Norm<S, kLayout, kVector> norm;
  Slope<S, kLayout, kVector> slope;
  FR_DEVICE StemNorm(const NormView<S>& view, const ActView<S>& act, const Tile& t, int64_t channel)
      : norm(view, t, channel), slope(act, t, channel) {}
};

template <class T, Layout kLayout, bool kVector, ActClass kClass>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2) stem_forward_kernel(StemForwardArgs<T> a) {
  using S = Stat<T>;
  constexpr bool kNhwc = kLayout == Layout::kNHWC;
  const StemTile& s = a.stem;
  const BlockPlace block(s.tile, true);
  const ThreadPlace<kLayout> thread(s.tile, block);
  const StemNorm<S, kLayout, kVector> of(a.norm, a.act, s.tile, thread.channel);
  for (StemCursor<kLayout> at(s, block, thread); at.inside(); at.advance(s)) {
    const int count = group_count(kNhwc ? s.tile.channels - thread.channel : s.ow - at.column);
    Winners<S> winners;
    FR_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      // Where all taps are -infinity: the first one inside.
      winners.best[j] = -static_cast<S>(INFINITY);
      winners.tap[j] = (at.row == 0 ? 3 : 0) + ((kNhwc ? at.column : at.column + j) == 0 ? 1 : 0);
    }
    FR_NO_UNROLL
    for (int kh = 0; kh < 3; ++kh) {
      const int64_t ih = clamp_to(2 * at.row - 1 + kh, s.h - 1);
      if constexpr (kNhwc) {
        meet_row_nhwc<T, kVector, kClass>(a, at, ih, of, count, winners);
      } else {
        meet_row_nchw<T, kVector, kClass>(a, at, ih, of, count, winners);
      }
    }
    if constexpr (kRising<kClass>) act_forward<kClass>(a.act.kind, of.slope, winners.best);
    const int64_t out = at.out(s, at.row, at.column);
    store_group<kVector>(a.y + out, winners.best, count);
    if (a.argmax != nullptr) store_bytes<kVector>(a.argmax + out, winners.taps(), count);
  }
}

}  // namespace fused_resnet::cuda
