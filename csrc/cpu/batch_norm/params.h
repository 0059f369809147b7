// Per-channel arrays in the workspace: what kernels read beside the data.
#pragma once

#include <cmath>
#include <cstring>

#include "fused_resnet/batch_norm.h"
#include "fused_resnet/workspace.h"
#include "kernels.h"

namespace fused_resnet::cpu {

inline int64_t padded_channels(int64_t c) { return (c + kChannelPad - 1) / kChannelPad * kChannelPad; }

// mean, scale, bias of one normalisation, padded so that whole vectors are readable.
template <class S>
struct NormArrays {
  S *mean, *scale, *bias;
  explicit NormArrays(Carver& carver, int64_t padded)
      : mean(carver.take<S>(padded)), scale(carver.take<S>(padded)), bias(carver.take<S>(padded)) {}

  // The forward and the backward must compute bit-equal `pre`: both come here.
  void fill(const NormParams& norm, int64_t c, int64_t padded) {
    const S* weight = static_cast<const S*>(norm.weight);
    const S* b = static_cast<const S*>(norm.bias);
    for (int64_t i = 0; i < c; ++i) {
      const S rstd = static_cast<const S*>(norm.rstd)[i];
      mean[i] = static_cast<const S*>(norm.mean)[i];
      scale[i] = weight == nullptr ? rstd : weight[i] * rstd;
      bias[i] = b == nullptr ? S(0) : b[i];
    }
    for (int64_t i = c; i < padded; ++i) mean[i] = scale[i] = bias[i] = S(0);
  }
};

template <class S>
void fill_slope(S* slope, const ActParams& act, int64_t c, int64_t padded) {
  const S* given = act.kind == Activation::kPrelu ? static_cast<const S*>(act.slope) : nullptr;
  for (int64_t i = 0; i < padded; ++i) {
    slope[i] = i >= c ? S(0) : given != nullptr ? given[i] : static_cast<S>(act.negative_slope);
  }
}

// b and c of dx = g * scale + (x - mean) * b + c, and the parameter gradients,
// from sum g and sum g * (x - mean) in double. docs/batch_norm_math.md.
template <class S>
struct GradientArrays {
  S *b, *c;
  explicit GradientArrays(Carver& carver, int64_t padded) : b(carver.take<S>(padded)), c(carver.take<S>(padded)) {}

  void zero(int64_t padded) {
    for (int64_t i = 0; i < padded; ++i) b[i] = c[i] = S(0);
  }
  void set(int64_t i, const NormParams& norm, S scale, double dbias, double dweight, double count) {
    const double rstd = static_cast<double>(static_cast<const S*>(norm.rstd)[i]);
    b[i] = static_cast<S>(-static_cast<double>(scale) * rstd * dweight / count);
    c[i] = static_cast<S>(-static_cast<double>(scale) * dbias / count);
  }
  void set(int64_t i, const NormParams& norm, S scale, double sum_g, double sum_gx, double count, void* dweight,
           void* dbias) {
    const double dw = sum_gx * static_cast<double>(static_cast<const S*>(norm.rstd)[i]);
    if (norm.batch_stats) set(i, norm, scale, sum_g, dw, count);
    if (dweight != nullptr) static_cast<S*>(dweight)[i] = static_cast<S>(dw);
    if (dbias != nullptr) static_cast<S*>(dbias)[i] = static_cast<S>(sum_g);
  }
};

}  // namespace fused_resnet::cpu
