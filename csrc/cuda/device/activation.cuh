// Activations of a few values at once. Kernels are compiled for each class of them, so that relu's keep no registers
// for what silu needs; which one of a class is asked once for all values: the answer is the same in every thread.
#pragma once

#include <cmath>

#include "device/storage.cuh"

namespace fused_resnet::cuda {

enum class ActClass : uint8_t {
  kClip,    // identity, relu
  kSlope,   // leaky_relu, prelu
  kSmooth,  // tanh, sigmoid, silu
};

inline ActClass class_of(Activation kind) {
  if (kind == Activation::kIdentity || kind == Activation::kRelu) return ActClass::kClip;
  return kind == Activation::kLeakyRelu || kind == Activation::kPrelu ? ActClass::kSlope : ActClass::kSmooth;
}

// What relu and the slopes save and read as a mask.
inline bool has_kink(Activation kind) { return kind != Activation::kIdentity && class_of(kind) != ActClass::kSmooth; }

FR_DEVICE float tanh_of(float x) { return tanhf(x); }
FR_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(0.0f - x)); }

// In double these are long, and doubles are for checking: one copy each, called.
__device__ inline FR_NO_INLINE double tanh_of(double x) { return tanh(x); }
__device__ inline FR_NO_INLINE double sigmoid(double x) { return 1.0 / (1.0 + exp(0.0 - x)); }

// v <- act(v). slope[j]: of leaky_relu and prelu.
template <ActClass kClass, int kCount, class S, class Slope>
FR_DEVICE void act_forward(Activation kind, const Slope& slope, S (&v)[kCount]) {
  if constexpr (kClass == ActClass::kClip) {
    if (kind == Activation::kIdentity) return;
    FR_UNROLL
    for (int j = 0; j < kCount; ++j) v[j] = v[j] <= S(0) ? S(0) : v[j];  // as ATen's on CUDA: keeps NaN, -0 becomes 0
  } else if constexpr (kClass == ActClass::kSlope) {
    FR_UNROLL
    for (int j = 0; j < kCount; ++j) v[j] = v[j] > S(0) ? v[j] : v[j] * slope[j];
  } else if (kind == Activation::kTanh) {
    FR_UNROLL
    for (int j = 0; j < kCount; ++j) v[j] = tanh_of(v[j]);
  } else {
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
template <ActClass kClass, int kCount, class S>
FR_DEVICE uint32_t keep_bits(const S (&pre)[kCount]) {
  constexpr bool kRelu = kClass == ActClass::kClip;
  uint32_t bits = 0;
  FR_UNROLL
  for (int j = 0; j < kCount; ++j) {
    const bool keep = kRelu ? !(pre[j] <= S(0)) : pre[j] > S(0);
    bits |= keep ? 1u << j : 0u;
  }
  return bits;
}

// g <- g where its bit is set, else 0 (relu) or slope * g.
template <ActClass kClass, int kCount, class S, class Slope>
FR_DEVICE void masked_gradient(uint32_t keep, const Slope& slope, S (&g)[kCount]) {
  constexpr bool kRelu = kClass == ActClass::kClip;
  FR_UNROLL
  for (int j = 0; j < kCount; ++j) {
    const S blocked = kRelu ? S(0) : g[j] * slope[j];
    g[j] = (keep >> j & 1u) != 0 ? g[j] : blocked;
  }
}

// g <- g * act'(pre).
template <ActClass kClass, int kCount, class S, class Slope>
FR_DEVICE void act_gradient(Activation kind, const S (&pre)[kCount], const Slope& slope, S (&g)[kCount]) {
  if (kind == Activation::kIdentity) return;
  if constexpr (kClass != ActClass::kSmooth) {
    masked_gradient<kClass>(keep_bits<kClass>(pre), slope, g);
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
