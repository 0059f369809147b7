// One lane's semantics of the instructions that are not a plain C++ operator.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>

namespace avx512_emulation {

// vmaxps, vminps: the second operand when either is NaN or both are zeros.
template <class T>
inline T larger(T a, T b) {
  return a > b ? a : b;
}
template <class T>
inline T smaller(T a, T b) {
  return a < b ? a : b;
}

// vcvtps2ph with round-to-nearest-even; NaN stays NaN, made quiet.
inline uint16_t half_from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | ((magnitude >> 13) & 0x3ff));
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and up round to infinity
  if (magnitude < 0x38800000) {                                              // subnormal half: units of 2^-24
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p24f;          // exact
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(scaled)));
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + odd) >> 13));
}

// vcvtph2ps: exact; NaN made quiet.
inline float float_from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = (half >> 10) & 31,
                 mantissa = half & 0x3ff;
  if (exponent == 31) {
    const uint32_t quiet = mantissa != 0 ? 0x400000u : 0u;
    return std::bit_cast<float>(sign | 0x7f800000 | quiet | (mantissa << 13));
  }
  if (exponent == 0)
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f));
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// vcvtneps2bf16: round to nearest even; subnormals become zeros; NaN made quiet.
inline uint16_t bfloat16_from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7f800000) == 0) return static_cast<uint16_t>((bits >> 16) & 0x8000);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float float_from_bfloat16(uint16_t value) { return std::bit_cast<float>(static_cast<uint32_t>(value) << 16); }

// One multiplication and addition of vdpbf16ps and tdpbf16ps: round to nearest even, whatever MXCSR says; denormals
// count as zeros, on both sides.
inline float flushed(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}
inline float add_product(float sum, uint16_t a, uint16_t b) {
  const float x = flushed(float_from_bfloat16(a)), y = flushed(float_from_bfloat16(b));
  return flushed(std::fma(x, y, flushed(sum)));
}

// vrndscale, to nearest even: rounds to a multiple of 2^-(imm >> 4).
template <class T>
inline T round_scale(T value, int imm) {
  if ((imm & 3) != 0) std::abort();  // another rounding mode: no kernel asks for one
  const T scale = std::ldexp(T(1), imm >> 4), scaled = value * scale;
  return std::isfinite(scaled) ? std::copysign(std::nearbyint(scaled) / scale, value) : value;
}

// vscalef: a * 2^floor(b).
template <class T>
inline T scale_by_power(T a, T b) {
  if (std::isnan(a) || std::isnan(b)) return a + b;
  if (std::isinf(b)) {
    if (b > 0)
      return a == 0 ? std::numeric_limits<T>::quiet_NaN() : std::copysign(std::numeric_limits<T>::infinity(), a);
    return std::isinf(a) ? std::numeric_limits<T>::quiet_NaN() : std::copysign(T(0), a);
  }
  const T power = std::floor(b);
  return std::ldexp(a, power > 10000 ? 10000 : power < -10000 ? -10000 : static_cast<int>(power));
}

// vcvtps2dq after rounding: out of range or NaN gives INT32_MIN.
template <class T>
inline int32_t int32_from(T value) {
  return value >= T(-2147483648.0) && value < T(2147483648.0) ? static_cast<int32_t>(value)
                                                              : std::numeric_limits<int32_t>::min();
}

// Comparison predicates _CMP_*: bit-compatible truth table over (less, equal, greater, unordered).
template <class T>
inline bool compare(T a, T b, int predicate) {
  const bool unordered = std::isnan(a) || std::isnan(b);
  switch (predicate & 15) {
    case 0:
      return a == b;  // EQ_OQ
    case 1:
      return a < b;  // LT_OS
    case 2:
      return a <= b;  // LE_OS
    case 3:
      return unordered;  // UNORD_Q
    case 4:
      return !(a == b);  // NEQ_UQ
    case 5:
      return !(a < b);  // NLT_US
    case 6:
      return !(a <= b);  // NLE_US
    case 7:
      return !unordered;  // ORD_Q
    case 8:
      return unordered || a == b;  // EQ_UQ
    case 9:
      return !(a >= b);  // NGE_US
    case 10:
      return !(a > b);  // NGT_US
    case 11:
      return false;  // FALSE_OQ
    case 12:
      return !unordered && a != b;  // NEQ_OQ
    case 13:
      return a >= b;  // GE_OS
    case 14:
      return a > b;  // GT_OS
    default:
      return true;  // TRUE_UQ
  }
}

}  // namespace avx512_emulation
