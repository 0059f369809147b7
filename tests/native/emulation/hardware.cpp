// The processor's own answers, from the scalar SSE forms of the same instructions; of bfloat16, which has none, where
// the processor has it.
#include "hardware.h"

#include <immintrin.h>

namespace hardware {

float larger(float a, float b) { return _mm_cvtss_f32(_mm_max_ss(_mm_set_ss(a), _mm_set_ss(b))); }
float smaller(float a, float b) { return _mm_cvtss_f32(_mm_min_ss(_mm_set_ss(a), _mm_set_ss(b))); }
int32_t to_int32(float a) { return _mm_cvtss_si32(_mm_set_ss(a)); }
bool equal(float a, float b) { return _mm_comieq_ss(_mm_set_ss(a), _mm_set_ss(b)) != 0 && a == a && b == b; }

bool not_less_or_equal(float a, float b) {
  return (_mm_movemask_ps(_mm_cmpnle_ss(_mm_set_ss(a), _mm_set_ss(b))) & 1) != 0;
}
bool greater(float a, float b) { return (_mm_movemask_ps(_mm_cmpgt_ss(_mm_set_ss(a), _mm_set_ss(b))) & 1) != 0; }
bool unordered(float a, float b) { return (_mm_movemask_ps(_mm_cmpunord_ss(_mm_set_ss(a), _mm_set_ss(b))) & 1) != 0; }

#define FR_BFLOAT16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512bf16")))

bool has_bfloat16() { return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16"); }

FR_BFLOAT16 void dot_products(const uint16_t* a, const uint16_t* b, const float* sum, float* out) {
  const auto va = (__m512bh)_mm512_loadu_si512(a), vb = (__m512bh)_mm512_loadu_si512(b);
  _mm512_storeu_ps(out, _mm512_dpbf16_ps(_mm512_loadu_ps(sum), va, vb));
}
FR_BFLOAT16 void narrow_two(const float* high, const float* low, uint16_t* out) {
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(high), _mm512_loadu_ps(low)));
}
FR_BFLOAT16 void smaller_magnitude(const float* a, const float* b, float* out) {
  _mm512_storeu_ps(out, _mm512_range_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b), 0b1010));
}
FR_BFLOAT16 void upper_half(const uint16_t* v, uint16_t* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_extracti64x4_epi64(_mm512_loadu_si512(v), 1));
}
FR_BFLOAT16 void permute(const uint16_t* index, const uint16_t* v, uint16_t* out) {
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_loadu_si512(index), _mm512_loadu_si512(v)));
}
FR_BFLOAT16 void combine(const uint16_t* a, const uint16_t* b, uint32_t (*out)[16]) {
  const __m512i va = _mm512_loadu_si512(a), vb = _mm512_loadu_si512(b);
  _mm512_storeu_si512(out[0], _mm512_max_epu32(va, vb));
  _mm512_storeu_si512(out[1], _mm512_min_epu32(va, vb));
  _mm512_storeu_si512(out[2], _mm512_unpacklo_epi32(va, vb));
  _mm512_storeu_si512(out[3], _mm512_unpackhi_epi32(va, vb));
  _mm512_storeu_si512(out[4], _mm512_unpacklo_epi64(va, vb));
  _mm512_storeu_si512(out[5], _mm512_unpackhi_epi64(va, vb));
}

}  // namespace hardware
