// Activations of a few values at once. Which one is asked once for all of them: the answer is the same in every thread.
#pragma once

#include <cmath>

#include "device/storage.cuh"

namespace fused_resnet::cuda {

// What relu and the slopes save and read as a mask.
__host__ FR_DEVICE bool has_kink(Activation kind) {
  return kind == Activation::kRelu || kind == Activation::kLeakyRelu || kind == Activation::kPrelu;
}

FR_DEVICE float tanh_of(float x) { return tanhf(x); }
FR_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(0.0f - x)); }

// In double these are long, and doubles are for checking: one copy each, called.
__device__ inline FR_NO_INLINE double tanh_of(double x) { return tanh(x); }
__device__ inline FR_NO_INLINE double sigmoid(double x) { return 1.0 / (1.0 + exp(0.0 - x)); }

// v <- act(v). slope[j]: of leaky_relu and prelu.
template <int kCount, class S, class Slope>
FR_DEVICE void act_forward(Activation kind, const Slope& slope, S (&v)[kCount]) {
  if (kind == Activation::kRelu) {
    FR_UNROLL
    for (int j = 0; j < kCount; ++j) v[j] = S(0) > v[j] ? S(0) : v[j];  // keeps NaN and -0
  } else if (kind == Activation::kLeakyRelu || kind == Activation::kPrelu) {
    FR_UNROLL
    for (int j = 0; j < kCount; ++j) v[j] = v[j] > S(0) ? v[j] : v[j] * slope[j];
  } else if (kind == Activation::kTanh) {
    FR_UNROLL
    for (int j = 0; j < kCount; ++j) v[j] = tanh_of(v[j]);
  } else if (kind != Activation::kIdentity) {
    const bool silu = kind == Activation::kSilu;
    FR_UNROLL
    for (int j = 0; j < kCount; ++j) {
      const S s = sigmoid(v[j]);
      v[j] = silu ? v[j] * s : s;
    }
  }
}

// Bit j: the gradient of element j passes unchanged. torch: relu blocks y <= 0, so NaN passes; leaky_relu and prelu
// pass x > 0, so NaN takes the slope.
template <int kCount, class S>
FR_DEVICE uint32_t keep_bits(Activation kind, const S (&pre)[kCount]) {
  const bool relu = kind == Activation::kRelu;
  uint32_t bits = 0;
  FR_UNROLL
  for (int j = 0; j < kCount; ++j) {
    const bool keep = relu ? !(pre[j] <= S(0)) : pre[j] > S(0);
    bits |= keep ? 1u << j : 0u;
  }
  return bits;
}

// g <- g where its bit is set, else 0 (relu) or slope * g.
template <int kCount, class S, class Slope>
FR_DEVICE void masked_gradient(Activation kind, uint32_t keep, const Slope& slope, S (&g)[kCount]) {
  const bool relu = kind == Activation::kRelu;
  FR_UNROLL
  for (int j = 0; j < kCount; ++j) {
    const S blocked = relu ? S(0) : g[j] * slope[j];
    g[j] = (keep >> j & 1u) != 0 ? g[j] : blocked;
  }
}

// g <- g * act'(pre).
template <int kCount, class S, class Slope>
FR_DEVICE void act_gradient(Activation kind, const S (&pre)[kCount], const Slope& slope, S (&g)[kCount]) {
  if (kind == Activation::kIdentity) return;
  if (has_kink(kind)) {
    masked_gradient(kind, keep_bits(kind, pre), slope, g);
  } else if (kind == Activation::kTanh) {
    FR_UNROLL
    for (int j = 0; j < kCount; ++j) {
      const S t = tanh_of(pre[j]);
      g[j] *= S(1) - t * t;
    }
  } else {
    const bool silu = kind == Activation::kSilu;
    FR_UNROLL
    for (int j = 0; j < kCount; ++j) {
      const S s = sigmoid(pre[j]), q = S(1) - s;
      g[j] *= s * (silu ? fma(pre[j], q, S(1)) : q);
    }
  }
}

}  // namespace fused_resnet::cuda
