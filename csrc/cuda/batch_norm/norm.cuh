// One normalisation inside a kernel. Forward and backward compute bit-equal `pre`: both come here.
#pragma once

#include "device/tile.cuh"
#include "fused_resnet/batch_norm.h"

namespace fused_resnet::cuda {

enum class ResidualKind : uint8_t { kNone, kAdd, kNorm };

// Per-channel operands; weight and bias may be null.
template <class S>
struct NormView {
  const S *mean = nullptr, *rstd = nullptr, *weight = nullptr, *bias = nullptr;
};

template <class S>
NormView<S> norm_view(const NormParams& p) {
  return {static_cast<const S*>(p.mean), static_cast<const S*>(p.rstd), static_cast<const S*>(p.weight),
          static_cast<const S*>(p.bias)};
}

template <class S, Layout kLayout, bool kVector>
struct Norm {
  Channels<S, kLayout, kVector> mean, rstd, weight, bias;

  FR_DEVICE Norm(const NormView<S>& view, const Tile& t, int64_t channel)
      : mean(view.mean, S(0), t, channel),
        rstd(view.rstd, S(0), t, channel),
        weight(view.weight, S(1), t, channel),
        bias(view.bias, S(0), t, channel) {}

  FR_DEVICE S scale(int j) const { return weight[j] * rstd[j]; }
  // x - mean, then pre.
  FR_DEVICE S centred(S x, int j) const { return x - mean[j]; }
  FR_DEVICE S affine(S centred, int j) const { return fma(centred, scale(j), bias[j]); }
};

// The slope of leaky_relu and prelu, per channel.
template <class S>
struct ActView {
  Activation kind = Activation::kIdentity;
  S negative_slope = 0;
  const S* slope = nullptr;
};

template <class S, Layout kLayout, bool kVector>
struct Slope : Channels<S, kLayout, kVector, false> {
  FR_DEVICE Slope(const ActView<S>& act, const Tile& t, int64_t channel)
      : Channels<S, kLayout, kVector, false>(act.slope, act.negative_slope, t, channel) {}
};

template <class S>
ActView<S> act_view(const ActParams& p) {
  const bool prelu = p.kind == Activation::kPrelu;
  return {p.kind, static_cast<S>(p.negative_slope), prelu ? static_cast<const S*>(p.slope) : nullptr};
}

// The gradient through one normalisation: dx = g * scale + (x - mean) * b + c. Fixed statistics pass g * scale alone,
// so that no 0 * infinity appears. b and c come from finalize.
template <class S>
struct ChainView {
  bool batch_stats = false;
  const S *b = nullptr, *c = nullptr;
};

template <class S, Layout kLayout, bool kVector>
struct Chain {
  bool batch_stats;
  Channels<S, kLayout, kVector> b, c;

  FR_DEVICE Chain(const ChainView<S>& view, const Tile& t, int64_t channel)
      : batch_stats(view.batch_stats),
        b(view.batch_stats ? view.b : nullptr, S(0), t, channel),
        c(view.batch_stats ? view.c : nullptr, S(0), t, channel) {}

  FR_DEVICE S through(S g, S scale, S centred, int j) const {
    return batch_stats ? fma(g, scale, fma(centred, b[j], c[j])) : g * scale;
  }
};

}  // namespace fused_resnet::cuda
