// Storage types and the scalar meaning of every conversion. Included inside the
// unnamed namespace of each kernel file: code built for a wide instruction set
// must not share symbols with code that runs on any CPU.
#pragma once

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline float to_float(BFloat16 x) { return bit_copy<float>(static_cast<uint32_t>(x.bits) << 16); }

// Round to nearest even; every NaN becomes the quiet NaN 0x7fc0, as in torch.
inline BFloat16 to_bfloat16(float x) {
  if (x != x) return {0x7fc0};
  const uint32_t u = bit_copy<uint32_t>(x);
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

inline float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31u;
  const uint32_t fraction = x.bits & 0x3ffu;
  if (exponent == 31) return bit_copy<float>(sign | 0x7f800000u | (fraction << 13));
  if (exponent != 0) return bit_copy<float>(sign | ((exponent + 112u) << 23) | (fraction << 13));
  const float magnitude = static_cast<float>(fraction) * 0x1p-24f;  // zero and subnormals, exact
  return bit_copy<float>(sign | bit_copy<uint32_t>(magnitude));
}

// Round to nearest even, overflow to infinity, NaN stays NaN.
inline Float16 to_float16(float x) {
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
}
