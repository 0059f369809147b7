// AVX-512 F+BW+DQ+VL: 16 floats (doubles, for checking only, stay with AVX2); with FR_AVX512_BF16 the CPU's own
// float -> bfloat16 conversion. Included inside an unnamed namespace, after
// storage.h and the intrinsics (or, in tests, their emulation).
#pragma once

#include "simd/storage.h"
#include "simd/vec_math.h"

struct Avx512Float {
  using S = float;
  using V = __m512;
  using M = __mmask16;
  static constexpr int kWidth = 16;

  static V zero() { return _mm512_setzero_ps(); }
  static V set1(S x) { return _mm512_set1_ps(x); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V min(V a, V b) { return _mm512_min_ps(a, b); }
  static V abs(V a) { return _mm512_andnot_ps(set1(-0.0f), a); }
  static V copy_sign(V magnitude, V sign) { return _mm512_or_ps(magnitude, _mm512_and_ps(set1(-0.0f), sign)); }

  static M gt(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static M not_le(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
  static M eq(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static M is_nan(V a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
  static M or_(M a, M b) { return static_cast<M>(a | b); }
  // `a` comes from memory in the backward passes. Folded into the blend it would be a masked load, which waits for the
  // mask and so for the other operand, and leaves the hardware prefetcher without a trail: measured 3 times slower.
  static V select(M m, V a, V b) { return _mm512_mask_blend_ps(m, b, in_register(a)); }
  static unsigned bits(M m) { return m; }
  static M from_bits(unsigned b) { return static_cast<M>(b); }

  static V round(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V scale2(V x, V n) { return _mm512_scalef_ps(x, n); }
  static V exp(V x) { return polynomial_exp<Avx512Float>(x); }
  static V tanh(V x) { return polynomial_tanh<Avx512Float>(x); }
  static double sum(V x) {
    float lane[kWidth];
    _mm512_storeu_ps(lane, x);
    double total = 0;
    for (float value : lane) total += value;
    return total;
  }

  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V load(const BFloat16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static V load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

  static constexpr int kDenormal = 0x20;  // a category of vfpclassps
  static __m256i narrow_bf16(V v) {
#ifdef FR_AVX512_BF16
    // The instruction makes zeros of denormals: a branch that is never taken keeps them.
    if (__builtin_expect(_mm512_fpclass_ps_mask(v, kDenormal) == 0, 1)) return bit_copy<__m256i>(_mm512_cvtneps_pbh(v));
#endif
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, bias), 16);
    return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(is_nan(v), rounded, _mm512_set1_epi32(0x7fc0)));
  }
#ifdef FR_AVX512_BF16
  static void store2(BFloat16* p, V a, V b) {
    if (__builtin_expect((_mm512_fpclass_ps_mask(a, kDenormal) | _mm512_fpclass_ps_mask(b, kDenormal)) == 0, 1)) {
      return _mm512_storeu_si512(p, bit_copy<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
    }
    store(p, a);
    store(p + kWidth, b);
  }
  // Of the smaller magnitude; NaN is no magnitude.
  static V smaller(V a, V b) {
    constexpr int kSmallerMagnitude = 0b1010;
    return _mm512_range_ps(a, b, kSmallerMagnitude);
  }
  // No lane is below the least normal number.
  static bool normal(V smallest) { return _mm512_cmp_ps_mask(smallest, _mm512_set1_ps(0x1p-126f), _CMP_LT_OQ) == 0; }
  // As store2, of values that are.
  static void store2_normal(BFloat16* p, V a, V b) {
    _mm512_storeu_si512(p, bit_copy<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
  }
  static void stream2_normal(BFloat16* p, V a, V b) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_copy<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
  }
  // What load finds after that.
  static void round2_normal(V* a, V* b) {
    const __m512i both = bit_copy<__m512i>(_mm512_cvtne2ps_pbh(*b, *a));
    const auto widened = [](__m256i half) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    };
    *a = widened(_mm512_castsi512_si256(both));
    *b = widened(_mm512_extracti64x4_epi64(both, 1));
  }
#endif
  static __m256i narrow_f16(V v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static void store(BFloat16* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v)); }
  static void store(Float16* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(v)); }
  static void stream(float* p, V v) { _mm512_stream_ps(p, v); }
  static void stream(BFloat16* p, V v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v)); }
  static void stream(Float16* p, V v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_f16(v)); }

  // Lane i becomes what lane lanes[i] was.
  static __m512i load_lanes(const int32_t* lanes) { return _mm512_loadu_si512(lanes); }
  static V permute(V v, __m512i lanes) { return _mm512_permutexvar_ps(lanes, v); }

  static V load_u8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void store_u8(uint8_t* p, V v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
  }
  static void fence() { _mm_sfence(); }
};
