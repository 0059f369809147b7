// AVX2 + FMA + F16C: 8 floats or 4 doubles. Included inside an unnamed
// namespace, after storage.h and <immintrin.h>.
#pragma once

#include "simd/storage.h"
#include "simd/vec_math.h"

struct Avx2Float {
  using S = float;
  using V = __m256;
  using M = __m256;
  static constexpr int kWidth = 8;

  static V zero() { return _mm256_setzero_ps(); }
  static V set1(S x) { return _mm256_set1_ps(x); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V div(V a, V b) { return _mm256_div_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static V min(V a, V b) { return _mm256_min_ps(a, b); }
  static V abs(V a) { return _mm256_andnot_ps(set1(-0.0f), a); }
  static V copy_sign(V magnitude, V sign) { return _mm256_or_ps(magnitude, _mm256_and_ps(set1(-0.0f), sign)); }

  static M gt(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static M not_le(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_NLE_UQ); }
  static M eq(V a, V b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static M is_nan(V a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
  static M or_(M a, M b) { return _mm256_or_ps(a, b); }
  static V select(M m, V a, V b) { return _mm256_blendv_ps(b, a, m); }
  static unsigned bits(M m) { return static_cast<unsigned>(_mm256_movemask_ps(m)); }
  static M from_bits(unsigned b) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32(static_cast<int>(b));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, lane), lane));
  }

  static V round(V x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // x * 2^n for integral n in [-126, 127].
  static V scale2(V x, V n) {
    const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(e));
  }
  static V exp(V x) { return polynomial_exp<Avx2Float>(x); }
  static V tanh(V x) { return polynomial_tanh<Avx2Float>(x); }
  static double sum(V x) {
    float lane[kWidth];
    _mm256_storeu_ps(lane, x);
    double total = 0;
    for (float value : lane) total += value;
    return total;
  }

  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V load(const BFloat16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static V load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

  static __m128i narrow_bf16(V v) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    __m256i result = _mm256_srli_epi32(_mm256_add_epi32(u, bias), 16);
    // A branch that is never taken costs less than a blend.
    if (const __m256 nan = is_nan(v); __builtin_expect(_mm256_movemask_ps(nan) != 0, 0)) {
      result = _mm256_blendv_epi8(result, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(nan));
    }
    return _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
  }
  static __m128i narrow_f16(V v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static void store(BFloat16* p, V v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v)); }
  static void store(Float16* p, V v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_f16(v)); }
  static void stream(float* p, V v) { _mm256_stream_ps(p, v); }
  static void stream(BFloat16* p, V v) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v)); }
  static void stream(Float16* p, V v) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_f16(v)); }

  // Lane i becomes what lane lanes[i] was.
  static __m256i load_lanes(const int32_t* lanes) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
  }
  static V permute(V v, __m256i lanes) { return _mm256_permutevar8x32_ps(v, lanes); }

  static V load_u8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static void store_u8(uint8_t* p, V v) {
    const __m256i i = _mm256_cvtps_epi32(v);
    const __m128i w = _mm_packus_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(w, w));
  }
  static void fence() { _mm_sfence(); }
};

struct Avx2Double {
  using S = double;
  using V = __m256d;
  using M = __m256d;
  static constexpr int kWidth = 4;

  static V zero() { return _mm256_setzero_pd(); }
  static V set1(S x) { return _mm256_set1_pd(x); }
  static V add(V a, V b) { return _mm256_add_pd(a, b); }
  static V sub(V a, V b) { return _mm256_sub_pd(a, b); }
  static V mul(V a, V b) { return _mm256_mul_pd(a, b); }
  static V div(V a, V b) { return _mm256_div_pd(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_pd(a, b, c); }
  static V max(V a, V b) { return _mm256_max_pd(a, b); }
  static V min(V a, V b) { return _mm256_min_pd(a, b); }

  static M gt(V a, V b) { return _mm256_cmp_pd(a, b, _CMP_GT_OQ); }
  static M not_le(V a, V b) { return _mm256_cmp_pd(a, b, _CMP_NLE_UQ); }
  static M eq(V a, V b) { return _mm256_cmp_pd(a, b, _CMP_EQ_OQ); }
  static M is_nan(V a) { return _mm256_cmp_pd(a, a, _CMP_UNORD_Q); }
  static M or_(M a, M b) { return _mm256_or_pd(a, b); }
  static V select(M m, V a, V b) { return _mm256_blendv_pd(b, a, m); }
  static unsigned bits(M m) { return static_cast<unsigned>(_mm256_movemask_pd(m)); }
  static M from_bits(unsigned b) {
    const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i all = _mm256_set1_epi64x(static_cast<long long>(b));
    return _mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_and_si256(all, lane), lane));
  }

  // Double precision is for checking, not for speed: the C library, lane by lane.
  static V exp(V x) {
    return per_lane(x, [](double value) { return __builtin_exp(value); });
  }
  static V tanh(V x) {
    return per_lane(x, [](double value) { return __builtin_tanh(value); });
  }
  static double sum(V x) {
    double lane[kWidth];
    _mm256_storeu_pd(lane, x);
    return (lane[0] + lane[1]) + (lane[2] + lane[3]);
  }

  static V load(const double* p) { return _mm256_loadu_pd(p); }
  static void store(double* p, V v) { _mm256_storeu_pd(p, v); }
  static void stream(double* p, V v) { _mm256_stream_pd(p, v); }
  static V load_u8(const uint8_t* p) { return _mm256_setr_pd(p[0], p[1], p[2], p[3]); }
  static void store_u8(uint8_t* p, V v) {
    double lane[kWidth];
    _mm256_storeu_pd(lane, v);
    for (int i = 0; i < kWidth; ++i) p[i] = static_cast<uint8_t>(lane[i]);
  }
  static void fence() { _mm_sfence(); }

 private:
  template <class F>
  static V per_lane(V x, F f) {
    double lane[kWidth];
    _mm256_storeu_pd(lane, x);
    for (double& value : lane) value = f(value);
    return _mm256_loadu_pd(lane);
  }
};
