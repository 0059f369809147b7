// Floats as sums of two or three bfloat16, multiplied by AMX tiles: a * b is the sum of the products of their parts,
// but for those below a float's rounding (three parts) or below 2^-16 of it (two). Included inside an unnamed
// namespace. Source: docs/convolution.md.
#pragma once

#include "conv/split_layout.h"
#include "simd/amx_unit.h"
#include "simd/vec_avx512.h"

// How small, and how large, the floats are that are split.
class Magnitudes {
 public:
  void add(__m512 v) {
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
    most_ = _mm512_max_epu32(most_, bits);
    least_ = _mm512_min_epu32(least_, _mm512_sub_epi32(bits, _mm512_set1_epi32(1)));  // of zero it is the largest
  }
  int smallness() const {
    uint32_t least[16], most[16], low = ~uint32_t{0}, high = 0;
    _mm512_storeu_si512(least, least_);
    _mm512_storeu_si512(most, most_);
    for (int i = 0; i < 16; ++i) {
      low = least[i] < low ? least[i] : low;
      high = most[i] > high ? most[i] : high;
    }
    if (high >> 23 > kMostExponent) return kNotSplittable;
    const int exponent = static_cast<int>(low >> 23);
    return exponent > 127 ? 0 : 127 - exponent;
  }

 private:
  __m512i least_ = _mm512_set1_epi32(-1), most_ = _mm512_setzero_si512();
};

inline __m256i nearest_bf16(__m512 v) { return bit_copy<__m256i>(_mm512_cvtneps_pbh(v)); }
inline __m512 without(__m512 v, __m256i part) {
  return _mm512_sub_ps(v, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16)));
}

// Sixteen channels of one pixel, or thirty-two; parts lie `stride` apart. Every difference is exact.
template <int kParts>
FR_INLINE inline void split_channels(__m512 v, int64_t stride, BFloat16* to) {
#pragma GCC unroll 3
  for (int i = 0; i < kParts; ++i) {
    const __m256i part = nearest_bf16(v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * stride), part);
    v = without(v, part);
  }
}
template <int kParts>
FR_INLINE inline void split_channels(__m512 v, __m512 w, int64_t stride, BFloat16* to) {
#pragma GCC unroll 3
  for (int i = 0; i < kParts; ++i) {
    const auto part = bit_copy<__m512i>(_mm512_cvtne2ps_pbh(w, v));
    _mm512_storeu_si512(to + i * stride, part);
    v = without(v, _mm512_castsi512_si256(part));
    w = without(w, _mm512_extracti64x4_epi64(part, 1));
  }
}

// Sixteen filters of two channels, in pairs.
FR_INLINE inline void split_pairs(__m512 low, __m512 high, int parts, int64_t stride, BFloat16* to) {
  for (int i = 0; i < parts; ++i) {
    const __m256i a = nearest_bf16(low), b = nearest_bf16(high);
    _mm512_storeu_si512(to + i * stride,
                        _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16)));
    low = without(low, a);
    high = without(high, b);
  }
}

// Sixteen filters of two channels from their three parts, which lie `stride` apart: every sum is exact.
FR_INLINE inline void join_pairs(const BFloat16* from, int64_t stride, __m512* low, __m512* high) {
  const auto upper = [](__m512i halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16)); };
  *low = *high = _mm512_setzero_ps();
  for (int i = 0; i < 3; ++i) {
    const __m512i pairs = _mm512_loadu_si512(from + i * stride);
    *low = _mm512_add_ps(*low, upper(pairs));
    *high = _mm512_add_ps(*high, upper(_mm512_srli_epi32(pairs, 16)));
  }
}

// One operand's tiles of 16 rows of 64 bytes, in bytes: from one part and from one row to the next.
struct TileParts {
  const char* at;
  int64_t part, pitch;
};

// Tiles as in multiply_step, zeroed after their last use for the same reason.
inline void load_positions(const TileParts& a, int part, bool both) {
  const char* at = a.at + part * a.part;
  _tile_loadd(4, at, a.pitch);
  if (both) _tile_loadd(5, at + 16 * a.pitch, a.pitch);
}
inline void drop_positions() {
  _tile_zero(4);
  _tile_zero(5);
}
template <int kVectors>
inline void load_filters(const TileParts& b, int part) {
  const char* at = b.at + part * b.part;
  _tile_loadd(6, at, b.pitch);
  if constexpr (kVectors == 2) _tile_loadd(7, at + 64, b.pitch);
}
template <int kVectors>
inline void drop_filters() {
  _tile_zero(6);
  if constexpr (kVectors == 2) _tile_zero(7);
}
template <int kVectors>
inline void add_products(bool both) {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kVectors == 2) _tile_dpbf16ps(1, 4, 7);
  if (both) _tile_dpbf16ps(2, 5, 6);
  if constexpr (kVectors == 2) {
    if (both) _tile_dpbf16ps(3, 5, 7);
  }
}

// How many times multiply_parts calls `between`.
constexpr int products_of(int parts) { return parts == 3 ? 6 : 3; }

// 32 channels, or pixels: the products of parts (i, j) with i + j < kParts, counted from zero, and of three parts also
// (1, 1) - the smaller ones mostly first, and so that one operand of the product before is kept. `between` comes after
// each of them.
template <int kVectors, int kParts, class F>
FR_INLINE inline void multiply_parts(const TileParts& a, const TileParts& b, bool both, F between) {
  const auto multiply = [&]() FR_INLINE {
    add_products<kVectors>(both);
    between();
  };
  if constexpr (kParts == 3) {
    load_positions(a, 2, both);
    load_filters<kVectors>(b, 0);
    multiply();  // 2, 0
    drop_positions();
    load_positions(a, 1, both);
    multiply();  // 1, 0
    drop_filters<kVectors>();
    load_filters<kVectors>(b, 1);
    multiply();  // 1, 1
    drop_positions();
    load_positions(a, 0, both);
    multiply();  // 0, 1
    drop_filters<kVectors>();
    load_filters<kVectors>(b, 2);
    multiply();  // 0, 2
    drop_filters<kVectors>();
    load_filters<kVectors>(b, 0);
  } else {
    load_positions(a, 1, both);
    load_filters<kVectors>(b, 0);
    multiply();  // 1, 0
    drop_positions();
    load_positions(a, 0, both);
    drop_filters<kVectors>();
    load_filters<kVectors>(b, 1);
    multiply();  // 0, 1
    drop_filters<kVectors>();
    load_filters<kVectors>(b, 0);
  }
  multiply();  // 0, 0
  drop_positions();
  drop_filters<kVectors>();
}

// Lines of an operand that is to come, some between every two products: many at once would wait for each other, and the
// products behind them.
template <int kBytes, int kProducts>
class LinesAhead {
 public:
  explicit LinesAhead(const char* from) : at_(from) {}
  FR_INLINE void next() {
    constexpr int kLine = 64, kLines = (kBytes / kLine + kProducts - 1) / kProducts;
#pragma GCC unroll 32
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(at_ + i * kLine);
    at_ += kLines * kLine;
  }

 private:
  const char* at_;
};
