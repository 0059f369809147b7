// Pairs of bfloat16 channels, accumulated in float by AVX512_BF16. Included inside an unnamed namespace.
#pragma once

#include "conv/dot.h"
#include "conv/operand_body.h"
#include "simd/bf16_pairs.h"

struct Bf16Dot {
  using Ops = Avx512Float;
  using C = BFloat16;
  using V = __m512;
  using State = NoState;
  static constexpr int kPair = 2, kStep = 2;
  static constexpr int64_t kChain = 0;
  static constexpr bool kTiles = false, kFlushes = true;

  static __m512i weights(const C* p) { return _mm512_loadu_si512(p); }
  static __m512i broadcast(const C* p) {
    int pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static V fma(__m512i a, __m512i b, V sum) {
    return _mm512_dpbf16_ps(sum, bit_copy<__m512bh>(a), bit_copy<__m512bh>(b));
  }
  // Neighbouring channels of one filter. The products take denormals for zero, and so may this.
  static __m512i rounded(const float* p) {
    return bit_copy<__m512i>(_mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + Ops::kWidth), _mm512_loadu_ps(p)));
  }
  // `count` filters of two channels, `next` apart; 0: there is no second channel.
  static void pack_row(const float* row, int64_t next, int64_t count, BFloat16* to) {
    for (int64_t f = 0; f < count; f += Ops::kWidth) {
      const auto lanes = static_cast<__mmask16>(count - f < Ops::kWidth ? (1 << (count - f)) - 1 : 0xffff);
      const __m512 low = _mm512_maskz_loadu_ps(lanes, row + f);
      const __m512 high = _mm512_maskz_loadu_ps(next == 0 ? 0 : lanes, row + next + f);
      _mm512_storeu_si512(to + f * kPair, pairs_of(low, high));
    }
  }
  static void pack_row(const BFloat16* row, int64_t next, int64_t count, BFloat16* to) {
    for (int64_t f = 0; f < count; f += Ops::kWidth) {
      const auto lanes = static_cast<__mmask16>(count - f < Ops::kWidth ? (1 << (count - f)) - 1 : 0xffff);
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, row + f));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(next == 0 ? 0 : lanes, row + next + f));
      _mm512_storeu_si512(to + f * kPair, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
};
