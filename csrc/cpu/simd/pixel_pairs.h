// Pairs of bfloat16 pixels of the weight gradient, multiplied by AVX512_BF16. Included inside an unnamed namespace
// after conv/weight_body.h.
#pragma once

#include "conv/weight_tile.h"
#include "simd/bf16_pairs.h"

template <int kFilters>
struct PixelPairs {
  using I = Avx512Float;
  using Unit = uint32_t;  // the first pixel's value in the low half
  using V = __m512i;
  using State = NoTiles;
  using Seen = NothingSeen;
  static constexpr int kGroup = 1, kParts = 1;
  static constexpr int kPair = 2, kWidth = I::kWidth, kMr = kFilters, kNr = 2;
  static V load(const Unit* p) { return _mm512_loadu_si512(p); }
  static void store(Unit* p, V v) { _mm512_storeu_si512(p, v); }
  static V broadcast(const Unit* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  static I::V multiply_add(V x, V y, I::V sum) {
    return _mm512_dpbf16_ps(sum, bit_copy<__m512bh>(x), bit_copy<__m512bh>(y));
  }
  static void pack(Unit* p, I::V v, I::V w, int64_t) { store(p, pairs_of(v, w)); }

  // Vectors of values that were rounded before, as pack() rounds them: two that are neighbours, any two, one and zeros.
  static void store_rounded(uint16_t* p, I::V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bit_copy<__m256i>(_mm512_cvtneps_pbh(v)));
  }
  static V neighbours(const uint16_t* p) { return in_pairs(_mm512_loadu_si512(p)); }
  static V pair(const uint16_t* p, const uint16_t* q) {
    return _mm512_or_si512(alone(p), _mm512_slli_epi32(alone(q), 16));
  }
  static V alone(const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static V none() { return _mm512_setzero_si512(); }
};
