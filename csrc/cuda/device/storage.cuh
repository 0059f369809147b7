// Storage types and what they mean in arithmetic. Rounding is to nearest even; a NaN stays a NaN.
#pragma once

#include <cstring>
#include <type_traits>

#include "launch.h"

#ifndef FR_SIMT
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fused_resnet::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What elements of T are computed in, and per-channel arrays are stored in ("stat dtype").
template <class T>
using Stat = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class To, class From>
FR_DEVICE To bit_copy(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

FR_DEVICE double to_stat(double x) { return x; }
FR_DEVICE float to_stat(float x) { return x; }
FR_DEVICE float to_stat(BFloat16 x) { return bit_copy<float>(static_cast<uint32_t>(x.bits) << 16); }
FR_DEVICE float to_stat(Float16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31u, fraction = x.bits & 0x3ffu;
  if (exponent == 31) return bit_copy<float>(sign | 0x7f800000u | (fraction << 13));
  if (exponent != 0) return bit_copy<float>(sign | ((exponent + 112u) << 23) | (fraction << 13));
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;  // zero and subnormals, exact
  return bit_copy<float>(sign | bit_copy<uint32_t>(magnitude));
#endif
}

// from_stat<T>(x): rounded to T.
template <class T>
FR_DEVICE T from_stat(Stat<T> x) {
  return x;
}
template <>
FR_DEVICE BFloat16 from_stat<BFloat16>(float x) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  if (x != x) return {0x7fc0};
  const uint32_t u = bit_copy<uint32_t>(x);
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
#endif
}
template <>
FR_DEVICE Float16 from_stat<Float16>(float x) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t u = bit_copy<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {  // subnormal result: the FPU rounds at 2^-24 when 0.5 is added
    const float shifted = bit_copy<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_copy<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

// Two 16-bit values in one word, the first one in the lower half: one conversion instruction where there is one.
template <class T>
FR_DEVICE uint32_t pack_two(float first, float second) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, BFloat16>) return bit_copy<uint32_t>(__floats2bfloat162_rn(first, second));
  return bit_copy<uint32_t>(__floats2half2_rn(first, second));
#else
  return static_cast<uint32_t>(from_stat<T>(first).bits) | static_cast<uint32_t>(from_stat<T>(second).bits) << 16;
#endif
}

}  // namespace fused_resnet::cuda
