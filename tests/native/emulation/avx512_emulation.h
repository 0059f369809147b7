// AVX-512 (F, BW, DQ, VL, BF16) intrinsics in plain C++, so that the kernels
// written for them compile and run, lane for lane, on a machine without them.
//
// Stands in for <immintrin.h> where FR_EMULATE_AVX512 is defined. Covers what
// csrc/cpu uses and near relatives; one that is missing is a compile error, never
// a silent difference. Semantics: Intel's Intrinsics Guide, rounding to nearest
// even; checked by emulation_test.cpp. Speed is no aim.
#pragma once

#include "scalar.h"
#include "vector.h"

enum {
  _CMP_EQ_OQ = 0,
  _CMP_LT_OS = 1,
  _CMP_LE_OS = 2,
  _CMP_UNORD_Q = 3,
  _CMP_NEQ_UQ = 4,
  _CMP_ORD_Q = 7,
  _CMP_NEQ_OQ = 12,
  _CMP_GE_OS = 13,
  _CMP_GT_OS = 14,
  _CMP_LT_OQ = 17,
  _CMP_LE_OQ = 18,
  _CMP_NLT_UQ = 21,
  _CMP_NLE_UQ = 22,
  _CMP_NGE_UQ = 25,
  _CMP_NGT_UQ = 26,
  _CMP_GE_OQ = 29,
  _CMP_GT_OQ = 30,
};
enum { _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_CUR_DIRECTION = 4, _MM_FROUND_NO_EXC = 8 };
enum { _MM_HINT_NTA = 0, _MM_HINT_T2 = 1, _MM_HINT_T1 = 2, _MM_HINT_T0 = 3 };

// Kernels unroll so much that emulated lanes inlined into them take minutes to
// compile: they call the one optimised copy in avx512_emulation.cpp.
#ifdef FR_EMULATION_DEFINITIONS
#define FR_EMULATED
#else
#define FR_EMULATED extern inline __attribute__((gnu_inline))
#endif

// r[i] = EXPRESSION of a = va[i] (and b, c), for lanes of type T.
#define FR_UNARY(NAME, V, T, EXPRESSION)                    \
  FR_EMULATED V NAME(V va) {                                \
    using namespace avx512_emulation;                       \
    return map<T>(va, [](T a) -> T { return EXPRESSION; }); \
  }
#define FR_BINARY(NAME, V, T, EXPRESSION)                            \
  FR_EMULATED V NAME(V va, V vb) {                                   \
    using namespace avx512_emulation;                                \
    return map<T>(va, vb, [](T a, T b) -> T { return EXPRESSION; }); \
  }
#define FR_TERNARY(NAME, V, T, EXPRESSION)                                    \
  FR_EMULATED V NAME(V va, V vb, V vc) {                                      \
    using namespace avx512_emulation;                                         \
    return map<T>(va, vb, vc, [](T a, T b, T c) -> T { return EXPRESSION; }); \
  }

// Whole-register moves.
#define FR_MEMORY(PREFIX, SUFFIX, V)                                                            \
  FR_EMULATED V PREFIX##_setzero_##SUFFIX() { return V{}; }                                     \
  FR_EMULATED V PREFIX##_loadu_##SUFFIX(const void* p) { return avx512_emulation::load<V>(p); } \
  FR_EMULATED void PREFIX##_storeu_##SUFFIX(void* p, V v) { avx512_emulation::store(p, v); }    \
  FR_EMULATED V PREFIX##_load_##SUFFIX(const void* p) {                                         \
    avx512_emulation::require_aligned<V>(p, "load");                                            \
    return avx512_emulation::load<V>(p);                                                        \
  }                                                                                             \
  FR_EMULATED void PREFIX##_store_##SUFFIX(void* p, V v) {                                      \
    avx512_emulation::require_aligned<V>(p, "store");                                           \
    avx512_emulation::store(p, v);                                                              \
  }                                                                                             \
  FR_EMULATED void PREFIX##_stream_##SUFFIX(void* p, V v) {                                     \
    avx512_emulation::require_aligned<V>(p, "streaming store");                                 \
    avx512_emulation::store(p, v);                                                              \
  }

// Moves and blends under a mask.
#define FR_MASKED(PREFIX, SUFFIX, V, M, T)                                      \
  FR_EMULATED V PREFIX##_mask_loadu_##SUFFIX(V source, M mask, const void* p) { \
    return avx512_emulation::mask_load<T>(source, mask, p);                     \
  }                                                                             \
  FR_EMULATED V PREFIX##_maskz_loadu_##SUFFIX(M mask, const void* p) {          \
    return avx512_emulation::mask_load<T>(V{}, mask, p);                        \
  }                                                                             \
  FR_EMULATED void PREFIX##_mask_storeu_##SUFFIX(void* p, M mask, V v) {        \
    avx512_emulation::mask_store<T>(p, mask, v);                                \
  }                                                                             \
  FR_EMULATED V PREFIX##_mask_blend_##SUFFIX(M mask, V a, V b) { return avx512_emulation::blend<T>(mask, a, b); }

#define FR_FLOATING(SUFFIX, V, M, T, BITS)                                                                            \
  FR_MEMORY(_mm512, SUFFIX, V)                                                                                        \
  FR_MASKED(_mm512, SUFFIX, V, M, T)                                                                                  \
  FR_EMULATED V _mm512_set1_##SUFFIX(T a) { return avx512_emulation::broadcast<V>(a); }                               \
  FR_BINARY(_mm512_add_##SUFFIX, V, T, a + b)                                                                         \
  FR_BINARY(_mm512_sub_##SUFFIX, V, T, a - b)                                                                         \
  FR_BINARY(_mm512_mul_##SUFFIX, V, T, a* b)                                                                          \
  FR_BINARY(_mm512_div_##SUFFIX, V, T, a / b)                                                                         \
  FR_BINARY(_mm512_max_##SUFFIX, V, T, larger(a, b))                                                                  \
  FR_BINARY(_mm512_min_##SUFFIX, V, T, smaller(a, b))                                                                 \
  FR_BINARY(_mm512_scalef_##SUFFIX, V, T, scale_by_power(a, b))                                                       \
  FR_UNARY(_mm512_sqrt_##SUFFIX, V, T, std::sqrt(a))                                                                  \
  FR_TERNARY(_mm512_fmadd_##SUFFIX, V, T, std::fma(a, b, c))                                                          \
  FR_TERNARY(_mm512_fmsub_##SUFFIX, V, T, std::fma(a, b, -c))                                                         \
  FR_TERNARY(_mm512_fnmadd_##SUFFIX, V, T, std::fma(-a, b, c))                                                        \
  FR_BINARY(_mm512_and_##SUFFIX, V, BITS, a& b)                                                                       \
  FR_BINARY(_mm512_or_##SUFFIX, V, BITS, a | b)                                                                       \
  FR_BINARY(_mm512_xor_##SUFFIX, V, BITS, a ^ b)                                                                      \
  FR_BINARY(_mm512_andnot_##SUFFIX, V, BITS, ~a& b)                                                                   \
  FR_EMULATED V _mm512_roundscale_##SUFFIX(V v, int imm) {                                                            \
    return avx512_emulation::map<T>(v, [=](T a) { return avx512_emulation::round_scale(a, imm); });                   \
  }                                                                                                                   \
  FR_EMULATED M _mm512_cmp_##SUFFIX##_mask(V a, V b, int predicate) {                                                 \
    using avx512_emulation::compare;                                                                                  \
    return static_cast<M>(avx512_emulation::mask_where<T>(a, b, [=](T x, T y) { return compare(x, y, predicate); })); \
  }                                                                                                                   \
  FR_EMULATED T _mm512_reduce_add_##SUFFIX(V v) { return avx512_emulation::halving_sum(avx512_emulation::lanes<T>(v)); }

FR_FLOATING(ps, __m512, __mmask16, float, uint32_t)
FR_EMULATED __mmask16 _mm512_fpclass_ps_mask(__m512 v, int categories) {
  if (categories != 0x20) std::abort();  // denormals: no kernel asks for another
  const auto denormal = [](float a, float) { return std::fpclassify(a) == FP_SUBNORMAL; };
  return static_cast<__mmask16>(avx512_emulation::mask_where<float>(v, v, denormal));
}
FR_EMULATED __m512 _mm512_range_ps(__m512 va, __m512 vb, int what) {
  if (what != 0b1010) std::abort();  // the smaller magnitude, without a sign: no kernel asks for another
  return avx512_emulation::map<float>(va, vb, [](float a, float b) { return std::fmin(std::fabs(a), std::fabs(b)); });
}
FR_FLOATING(pd, __m512d, __mmask8, double, uint64_t)

FR_MEMORY(_mm, si128, __m128i)
FR_MEMORY(_mm256, si256, __m256i)
FR_MEMORY(_mm512, si512, __m512i)
FR_MEMORY(_mm256, ps, __m256)
FR_MASKED(_mm, epi8, __m128i, __mmask16, uint8_t)
FR_MASKED(_mm256, epi16, __m256i, __mmask16, uint16_t)
FR_MASKED(_mm512, epi16, __m512i, __mmask32, uint16_t)
FR_MASKED(_mm512, epi32, __m512i, __mmask16, uint32_t)

FR_EMULATED __m512i _mm512_set1_epi32(int a) { return avx512_emulation::broadcast<__m512i>(a); }
FR_BINARY(_mm512_add_epi32, __m512i, uint32_t, a + b)
FR_BINARY(_mm512_sub_epi32, __m512i, uint32_t, a - b)
FR_BINARY(_mm512_max_epu32, __m512i, uint32_t, larger(a, b))
FR_BINARY(_mm512_min_epu32, __m512i, uint32_t, smaller(a, b))
FR_BINARY(_mm512_and_si512, __m512i, uint32_t, a& b)
FR_BINARY(_mm512_or_si512, __m512i, uint32_t, a | b)
FR_BINARY(_mm512_xor_si512, __m512i, uint32_t, a ^ b)
FR_EMULATED __m512i _mm512_slli_epi32(__m512i v, unsigned n) {
  return avx512_emulation::map<uint32_t>(v, [=](uint32_t a) { return n > 31 ? 0 : a << n; });
}
FR_EMULATED __m512i _mm512_srli_epi32(__m512i v, unsigned n) {
  return avx512_emulation::map<uint32_t>(v, [=](uint32_t a) { return n > 31 ? 0 : a >> n; });
}

// Lanes of each quarter: its lower or upper half, of a and b in turn.
#define FR_UNPACK(NAME, T, UPPER)                                                      \
  FR_EMULATED __m512i NAME(__m512i va, __m512i vb) {                                   \
    const auto a = avx512_emulation::lanes<T>(va), b = avx512_emulation::lanes<T>(vb); \
    constexpr int kEach = static_cast<int>(16 / sizeof(T));                            \
    return avx512_emulation::generate<T, __m512i>([&](int i) {                         \
      const int from = i / kEach * kEach + (UPPER) * kEach / 2 + i % kEach / 2;        \
      return i % 2 == 0 ? a[from] : b[from];                                           \
    });                                                                                \
  }
FR_UNPACK(_mm512_unpacklo_epi32, uint32_t, 0)
FR_UNPACK(_mm512_unpackhi_epi32, uint32_t, 1)
FR_UNPACK(_mm512_unpacklo_epi64, uint64_t, 0)
FR_UNPACK(_mm512_unpackhi_epi64, uint64_t, 1)

// The same bits under another type.
FR_EMULATED __m512i _mm512_castps_si512(__m512 v) { return std::bit_cast<__m512i>(v); }
FR_EMULATED __m512 _mm512_castsi512_ps(__m512i v) { return std::bit_cast<__m512>(v); }
FR_EMULATED __m512i _mm512_castpd_si512(__m512d v) { return std::bit_cast<__m512i>(v); }
FR_EMULATED __m512d _mm512_castsi512_pd(__m512i v) { return std::bit_cast<__m512d>(v); }

FR_EMULATED __m256i _mm512_castsi512_si256(__m512i v) {
  const auto all = avx512_emulation::lanes<uint32_t>(v);
  return avx512_emulation::generate<uint32_t, __m256i>([&](int i) { return all[i]; });
}
FR_EMULATED __m256i _mm512_extracti64x4_epi64(__m512i v, int half) {
  const auto all = avx512_emulation::lanes<uint32_t>(v);
  return avx512_emulation::generate<uint32_t, __m256i>([&](int i) { return all[i + 8 * (half & 1)]; });
}
// The upper half is undefined: NaNs of any type, so that a lane that is used shows.
FR_EMULATED __m512i _mm512_castsi256_si512(__m256i v) {
  const auto low = avx512_emulation::lanes<uint32_t>(v);
  return avx512_emulation::generate<uint32_t, __m512i>([&](int i) { return i < 8 ? low[i] : ~0u; });
}

// Lane by lane: TO_V NAME(FROM_V).
#define FR_CONVERT(NAME, FROM_V, FROM, TO_V, TO, EXPRESSION)                    \
  FR_EMULATED TO_V NAME(FROM_V v) {                                             \
    using namespace avx512_emulation;                                           \
    return convert<FROM, TO, TO_V>(v, [](FROM a) -> TO { return EXPRESSION; }); \
  }
FR_CONVERT(_mm512_cvtph_ps, __m256i, uint16_t, __m512, float, float_from_half(a))
FR_CONVERT(_mm512_cvtneps_pbh, __m512, float, __m256bh, uint16_t, bfloat16_from_float(a))
FR_CONVERT(_mm512_cvtepu16_epi32, __m256i, uint16_t, __m512i, uint32_t, a)
FR_CONVERT(_mm512_cvtepu8_epi32, __m128i, uint8_t, __m512i, uint32_t, a)
FR_CONVERT(_mm512_cvtepi32_epi16, __m512i, uint32_t, __m256i, uint16_t, static_cast<uint16_t>(a))
FR_CONVERT(_mm512_cvtepi32_epi8, __m512i, uint32_t, __m128i, uint8_t, static_cast<uint8_t>(a))
FR_CONVERT(_mm512_cvtepi32_ps, __m512i, int32_t, __m512, float, static_cast<float>(a))
FR_CONVERT(_mm512_cvtps_epi32, __m512, float, __m512i, int32_t, int32_from(std::nearbyint(a)))
FR_CONVERT(_mm512_cvtps_pd, __m256, float, __m512d, double, a)
FR_CONVERT(_mm512_cvtpd_ps, __m512d, double, __m256, float, static_cast<float>(a))

// The second operand's lanes are the lower half.
FR_EMULATED __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  const auto above = avx512_emulation::lanes<float>(high), below = avx512_emulation::lanes<float>(low);
  return avx512_emulation::generate<uint16_t, __m512bh>(
      [&](int i) { return avx512_emulation::bfloat16_from_float(i < 16 ? below[i] : above[i - 16]); });
}
FR_EMULATED __m512i _mm512_permutexvar_epi16(__m512i index, __m512i v) {
  const auto from = avx512_emulation::lanes<uint16_t>(index), a = avx512_emulation::lanes<uint16_t>(v);
  return avx512_emulation::generate<uint16_t, __m512i>([&](int i) { return a[from[i] % 32]; });
}
FR_EMULATED __m512i _mm512_permutexvar_epi32(__m512i index, __m512i v) {
  const auto from = avx512_emulation::lanes<uint32_t>(index), a = avx512_emulation::lanes<uint32_t>(v);
  return avx512_emulation::generate<uint32_t, __m512i>([&](int i) { return a[from[i] % 16]; });
}
FR_EMULATED __m512 _mm512_permutexvar_ps(__m512i index, __m512 v) {
  return _mm512_castsi512_ps(_mm512_permutexvar_epi32(index, _mm512_castps_si512(v)));
}
// The second of each pair, then the first, each rounded.
FR_EMULATED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh va, __m512bh vb) {
  const auto s = avx512_emulation::lanes<float>(sum);
  const auto a = avx512_emulation::lanes<uint16_t>(va), b = avx512_emulation::lanes<uint16_t>(vb);
  return avx512_emulation::generate<float, __m512>([&](int i) {
    const float second = avx512_emulation::add_product(s[i], a[2 * i + 1], b[2 * i + 1]);
    return avx512_emulation::add_product(second, a[2 * i], b[2 * i]);
  });
}

FR_EMULATED __m256i _mm512_cvtps_ph(__m512 v, int rounding) {
  if ((rounding & 3) != _MM_FROUND_TO_NEAREST_INT) std::abort();
  return avx512_emulation::convert<float, uint16_t, __m256i>(v, avx512_emulation::half_from_float);
}

template <class P>
inline void _mm_prefetch(const P*, int) {}
FR_EMULATED void _mm_sfence() {}
