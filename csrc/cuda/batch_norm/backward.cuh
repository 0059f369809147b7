// Backward: g = dy * act'(pre), then
//
//   reduce   sums of g, g * (x - mean), g * (residual - r_mean), and prelu's dy * pre where pre <= 0, per chunk
//   apply    dx = g * scale [+ (x - mean) * b + c];  dresidual = g, or the same through the residual's norm
//
// act' comes from the mask, or from `pre` recomputed with forward's own functions. Mapping: device/tile.cuh; apply
// walks the last chunk first, which reduce left in the second-level cache. Sums are in the stat dtype over one chunk,
// added over the block in a fixed order. Partials: finalize.cuh. Each pass reads dy and x (and the residual where it is
// needed: a second norm, or a derivative without mask) once; apply writes dx and dresidual once.
#pragma once

#include "batch_norm/apply.cuh"
#include "batch_norm/finalize.cuh"

namespace fused_resnet::cuda {

// Blocks that share a multiprocessor, and groups of each tensor that a thread has under way. Some cases take more
// registers than two blocks have: the parameters of 8 channels of two norms, or sums beside 16-bit values of three
// tensors (there one block loads more ahead). With identity or relu they fit, but for the pixels of odd lengths.
template <class T, Layout kLayout, bool kVector, ResidualKind kResidual, ActClass kClass, bool kReduce>
struct GradientPace {
  static constexpr bool kNhwc = kLayout == Layout::kNHWC, kNorm = kResidual == ResidualKind::kNorm;
  static constexpr bool kFullSums = kReduce && kResidual == ResidualKind::kAdd && sizeof(T) == 2;
  static constexpr bool kDealtSums = !kNhwc && !kVector && kReduce && kResidual != ResidualKind::kNone;
  static constexpr bool kFull = (kNhwc && (kNorm || kFullSums)) || kDealtSums;
  static constexpr bool kFits = kClass == ActClass::kClip && (kVector || !kNhwc);
  static constexpr int kBlocks = sizeof(T) == 8 || (kFull && !kFits) ? 1 : 2;
  static constexpr bool kOne = kNhwc && ((kNorm && kFits) || (sizeof(T) == 4 && !kVector));
  static constexpr int kInVectors = sizeof(T) == 8 || kOne ? 1 : kNhwc && kFullSums ? 4 : 2;
  static constexpr int kBatch = kBatchOf<kLayout, kVector, kInVectors>;
};

template <class T>
struct BackwardArgs {
  using S = Stat<T>;
  Tile tile;
  const T *dy, *x;
  const T* residual;    // kAdd: null where pre is not needed
  const uint8_t* mask;  // null: pre is recomputed
  NormView<S> norm, residual_norm;
  ActView<S> act;
  S* partials;  // reduce
  bool sum_slope;
  ChainView<S> chain, residual_chain;  // apply
  T *dx, *dresidual;                   // nullable
};

// What both passes know of a thread's channels.
template <class T, Layout kLayout, bool kVector, ResidualKind kResidual>
struct GradientOf {
  using S = Stat<T>;
  Norm<S, kLayout, kVector> norm, second;
  Slope<S, kLayout, kVector> slope;

  FR_DEVICE GradientOf(const BackwardArgs<T>& a, int64_t channel)
      : norm(a.norm, a.tile, channel),
        second(a.residual_norm, a.tile, kResidual == ResidualKind::kNorm ? channel : 0),
        slope(a.act, a.tile, channel) {}
};

// Where forward may have kept a mask.
template <ResidualKind kResidual, ActClass kClass>
inline constexpr bool kMasked = kResidual != ResidualKind::kNone && kClass != ActClass::kSmooth;

// One group of every input.
template <class T, ResidualKind kResidual, ActClass kClass>
struct GradientInput {
  Group<T> dy, x, residual;
  uint32_t keep;

  template <class Place>
  FR_DEVICE void load(const BackwardArgs<T>& a, const Place& place) {
    const Tile& t = a.tile;
    dy = place.load(t, a.dy);
    x = place.load(t, a.x);
    if constexpr (kResidual == ResidualKind::kNorm) residual = place.load(t, a.residual);
    if constexpr (kResidual == ResidualKind::kAdd) {
      if (a.residual != nullptr) residual = place.load(t, a.residual);
    }
    if constexpr (kMasked<kResidual, kClass>) {
      if (a.mask != nullptr) keep = place.load_mask(t, a.mask);
    }
  }
};

// g, x - mean, residual - r_mean of one group, and dy * pre where pre <= 0.
template <class S>
struct Gradient {
  S g[kGroup], centred[kGroup], residual[kGroup], slope_term[kGroup];
};

template <ActClass kClass, class T, Layout kLayout, bool kVector, ResidualKind kResidual>
FR_DEVICE void gradient(const BackwardArgs<T>& a, const GradientOf<T, kLayout, kVector, kResidual>& of,
                        const GradientInput<T, kResidual, kClass>& in, bool sum_slope, Gradient<Stat<T>>& out) {
  using S = Stat<T>;
  FR_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    out.g[j] = in.dy[j];
    out.centred[j] = of.norm.centred(in.x[j], j);
    out.residual[j] = kResidual == ResidualKind::kNorm ? of.second.centred(in.residual[j], j) : S(0);
    out.slope_term[j] = 0;
  }
  if (a.act.kind == Activation::kIdentity) return;
  if constexpr (kMasked<kResidual, kClass>) {
    if (a.mask != nullptr) return masked_gradient<kClass>(in.keep, of.slope, out.g);
  }
  S pre[kGroup];
  FR_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    pre[j] = of.norm.affine(out.centred[j], j);
    if constexpr (kResidual == ResidualKind::kAdd) pre[j] += in.residual[j];
    if constexpr (kResidual == ResidualKind::kNorm) pre[j] += of.second.affine(out.residual[j], j);
    if (kClass == ActClass::kSlope && sum_slope) out.slope_term[j] = pre[j] > S(0) ? S(0) : out.g[j] * pre[j];
  }
  act_gradient<kClass>(a.act.kind, pre, of.slope, out.g);
}

template <class T, Layout kLayout, bool kVector, ResidualKind kResidual, ActClass kClass>
__global__ void __launch_bounds__(kThreads, GradientPace<T, kLayout, kVector, kResidual, kClass, true>::kBlocks)
    backward_reduce_kernel(BackwardArgs<T> a) {
  using S = Stat<T>;
  constexpr int kBatch = GradientPace<T, kLayout, kVector, kResidual, kClass, true>::kBatch;
  const Tile& t = a.tile;
  const BlockPlace block(t, false);
  const ThreadPlace<kLayout> thread(t, block);
  Cursor<kLayout, kVector> cursor(t, block, thread);
  const GradientOf<T, kLayout, kVector, kResidual> of(a, thread.channel);

  S sum_g[kGroup] = {}, sum_gx[kGroup] = {}, sum_gr[kGroup] = {}, sum_slope[kGroup] = {};
  while (cursor.inside()) {
    Place<kLayout, kVector> place[kBatch];
    GradientInput<T, kResidual, kClass> in[kBatch];
    take_places(t, cursor, place);
    FR_UNROLL
    for (int k = 0; k < kBatch; ++k) in[k].load(a, place[k]);
    FR_UNROLL
    for (int k = 0; k < kBatch; ++k) {
      if (!place[k].inside) continue;
      Gradient<S> v;
      gradient<kClass>(a, of, in[k], a.sum_slope, v);
      const uint32_t valid = place[k].valid(t);
      FR_UNROLL
      for (int j = 0; j < kGroup; ++j) {
        if (!kVector && (valid >> j & 1u) == 0) continue;
        sum_g[j] += v.g[j];
        sum_gx[j] = fma(v.g[j], v.centred[j], sum_gx[j]);
        if constexpr (kResidual == ResidualKind::kNorm) sum_gr[j] = fma(v.g[j], v.residual[j], sum_gr[j]);
        if (kClass == ActClass::kSlope && a.sum_slope) sum_slope[j] += v.slope_term[j];
      }
    }
  }
  S* const out = a.partials + block.chunk * kSums * t.padded;
  store_sums<S, kLayout>(t, block, thread, sum_g, out + kSumG * t.padded);
  store_sums<S, kLayout>(t, block, thread, sum_gx, out + kSumGX * t.padded);
  if constexpr (kResidual == ResidualKind::kNorm) {
    store_sums<S, kLayout>(t, block, thread, sum_gr, out + kSumGR * t.padded);
  }
  if constexpr (kClass == ActClass::kSlope) {
    if (a.sum_slope) store_sums<S, kLayout>(t, block, thread, sum_slope, out + kSumSlope * t.padded);
  }
}

template <class T, Layout kLayout, bool kVector, ResidualKind kResidual, ActClass kClass>
__global__ void __launch_bounds__(kThreads, GradientPace<T, kLayout, kVector, kResidual, kClass, false>::kBlocks)
    backward_apply_kernel(BackwardArgs<T> a) {
  using S = Stat<T>;
  constexpr int kBatch = GradientPace<T, kLayout, kVector, kResidual, kClass, false>::kBatch;
  constexpr bool kNorm = kResidual == ResidualKind::kNorm;
  const Tile& t = a.tile;
  const BlockPlace block(t, true);
  const ThreadPlace<kLayout> thread(t, block);
  Cursor<kLayout, kVector> cursor(t, block, thread);
  const GradientOf<T, kLayout, kVector, kResidual> of(a, thread.channel);
  const Chain<S, kLayout, kVector> chain(a.chain, t, thread.channel);
  const Chain<S, kLayout, kVector> second(a.residual_chain, t, kNorm ? thread.channel : 0);

  while (cursor.inside()) {
    Place<kLayout, kVector> place[kBatch];
    GradientInput<T, kResidual, kClass> in[kBatch];
    take_places(t, cursor, place);
    FR_UNROLL
    for (int k = 0; k < kBatch; ++k) in[k].load(a, place[k]);
    FR_UNROLL
    for (int k = 0; k < kBatch; ++k) {
      if (!place[k].inside) continue;
      Gradient<S> v;
      gradient<kClass>(a, of, in[k], false, v);
      S out[kGroup];
      if (a.dx != nullptr) {
        FR_UNROLL
        for (int j = 0; j < kGroup; ++j) out[j] = chain.through(v.g[j], of.norm.scale(j), v.centred[j], j);
        place[k].store(t, a.dx, out);
      }
      if constexpr (kResidual != ResidualKind::kNone) {
        if (a.dresidual != nullptr) {
          FR_UNROLL
          for (int j = 0; j < kGroup; ++j) {
            out[j] = kNorm ? second.through(v.g[j], of.second.scale(j), v.residual[j], j) : v.g[j];
          }
          place[k].store(t, a.dresidual, out);
        }
      }
    }
  }
}

}  // namespace fused_resnet::cuda
