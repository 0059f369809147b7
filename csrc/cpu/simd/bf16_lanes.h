// Lanes of two bfloat16 channels, permuted among 16 channels, accumulated in float by AVX512_BF16. Included inside an
// unnamed namespace.
#pragma once

#include "simd/vec_avx512.h"

struct Bf16Lanes {
  using Ops = Avx512Float;
  using C = BFloat16;
  static constexpr int kPair = 2;
  static __m512i lanes(const int32_t* p) { return _mm512_loadu_si512(p); }
  // 16 channels are 8 lanes; no lane asks for another.
  static __m512i vector(const C* p) {
    return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static __m512i weights(const C* p) { return _mm512_loadu_si512(p); }
  static __m512i permute(__m512i v, __m512i lanes) { return _mm512_permutexvar_epi32(lanes, v); }
  static __m512 fma(__m512i a, __m512i b, __m512 sum) {
    return _mm512_dpbf16_ps(sum, bit_copy<__m512bh>(a), bit_copy<__m512bh>(b));
  }
};
