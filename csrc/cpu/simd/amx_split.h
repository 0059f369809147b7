// Floats as sums of two or three bfloat16, multiplied by AMX tiles: a * b is the sum of the products of their parts,
// but for those below a float's rounding (three parts) or below 2^-16 of it (two). Included inside an unnamed
// namespace. Source: docs/convolution.md.
#pragma once

#include "conv/split_layout.h"
#include "simd/amx_tile.h"

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

// A packed operand, in elements.
struct SplitOperand {
  const BFloat16* data;
  int64_t part, step, channels;  // from one part to the next, and from one position to the next
};

// Tiles as in multiply_tiles, zeroed after their last use for the same reason.
inline void load_positions(const BFloat16* p, int64_t step, bool both) {
  _tile_loadd(4, p, step * 2);
  if (both) _tile_loadd(5, p + 16 * step, step * 2);
}
inline void drop_positions() {
  _tile_zero(4);
  _tile_zero(5);
}
template <int kVectors>
inline void load_filters(const BFloat16* b) {
  _tile_loadd(6, b, kVectors * 64);
  if constexpr (kVectors == 2) _tile_loadd(7, b + 32, kVectors * 64);
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

// Lines of the weights two steps ahead. They come between products: many at once would wait for each other, and the
// products behind them.
template <int kBytes, int kProducts>
class LinesAhead {
 public:
  explicit LinesAhead(const BFloat16* from) : at_(reinterpret_cast<const char*>(from)) {}
  FR_INLINE void next() {
    constexpr int kLine = 64, kLines = (kBytes / kLine + kProducts - 1) / kProducts;
#pragma GCC unroll 32
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(at_ + i * kLine);
    at_ += kLines * kLine;
  }

 private:
  const char* at_;
};

// 32 channels: the products of parts (i, j) with i + j < kParts, counted from zero, and of three parts also (1, 1) -
// the smaller ones mostly first, and so that one operand of the product before is kept.
template <int kVectors, int kParts>
inline void multiply_parts(const BFloat16* p, const SplitOperand& a, const BFloat16* b, bool both) {
  constexpr int64_t kPart = kSplitStep * kVectors * 16, kAhead = 2;
  LinesAhead<kParts * kPart * sizeof(BFloat16), kParts == 3 ? 6 : 3> ahead(b + kAhead * kParts * kPart);
  const auto multiply = [&]() FR_INLINE {
    add_products<kVectors>(both);
    ahead.next();
  };
  if constexpr (kParts == 3) {
    load_positions(p + 2 * a.part, a.step, both);
    load_filters<kVectors>(b);
    multiply();  // 2, 0
    drop_positions();
    load_positions(p + a.part, a.step, both);
    multiply();  // 1, 0
    drop_filters<kVectors>();
    load_filters<kVectors>(b + kPart);
    multiply();  // 1, 1
    drop_positions();
    load_positions(p, a.step, both);
    multiply();  // 0, 1
    drop_filters<kVectors>();
    load_filters<kVectors>(b + 2 * kPart);
    multiply();  // 0, 2
    drop_filters<kVectors>();
    load_filters<kVectors>(b);
  } else {
    load_positions(p + a.part, a.step, both);
    load_filters<kVectors>(b);
    multiply();  // 1, 0
    drop_positions();
    load_positions(p, a.step, both);
    drop_filters<kVectors>();
    load_filters<kVectors>(b + kPart);
    multiply();  // 0, 1
    drop_filters<kVectors>();
    load_filters<kVectors>(b);
  }
  multiply();  // 0, 0
  drop_positions();
  drop_filters<kVectors>();
}

// As multiply_tiles, for steps [begin, end) of all taps and channels.
template <int kVectors, int kParts>
inline void multiply_steps(int64_t rows, const TapOffsets& taps, const SplitOperand& a, const BFloat16* b,
                           int64_t begin, int64_t end, float* out) {
  constexpr int64_t kSize = kParts * kSplitStep * kVectors * 16, kRow = kVectors * 64;
  const bool both = rows > 16;
  tiles_read_memory();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  b += begin * kSize;
  const int64_t each = a.channels / kSplitStep;  // steps of a tap
  for (int64_t k = begin; k < end;) {
    const int64_t tap = k / each, first = k % each, last = each - first < end - k ? each : first + end - k;
    const BFloat16* p = a.data + taps.row[tap / taps.cols] + taps.col[tap % taps.cols] + first * kSplitStep;
    for (int64_t i = first; i < last; ++i, p += kSplitStep, b += kSize) {
      multiply_parts<kVectors, kParts>(p, a, b, both);
    }
    k += last - first;
  }
  _tile_stored(0, out, kRow);
  if constexpr (kVectors == 2) _tile_stored(1, out + 16, kRow);
  if (!both) return;
  _tile_stored(2, out + 16 * 16 * kVectors, kRow);
  if constexpr (kVectors == 2) _tile_stored(3, out + 16 * 16 * kVectors + 16, kRow);
}

// The same, with sums of at most kSplitChain steps added up apart: long chains of float additions lose more. Those of
// steps before `begin` stand in `out`.
template <int kVectors, int kParts>
inline void multiply_split(int64_t rows, const TapOffsets& taps, const SplitOperand& a, const BFloat16* b,
                           int64_t begin, int64_t end, float* out) {
  if (begin == 0) {
    const int64_t last = end < kSplitChain ? end : kSplitChain;
    multiply_steps<kVectors, kParts>(rows, taps, a, b, 0, last, out);
    begin = last;
  }
  alignas(64) float sums[32 * kVectors * 16];
  for (; begin < end; begin += kSplitChain) {
    const int64_t last = end - begin < kSplitChain ? end : begin + kSplitChain;
    multiply_steps<kVectors, kParts>(rows, taps, a, b, begin, last, sums);
    for (int64_t i = 0; i < rows * kVectors * 16; i += 16) {
      Avx512Float::store(out + i, Avx512Float::add(Avx512Float::load(out + i), Avx512Float::load(sums + i)));
    }
  }
}

using MultiplySplit = void (*)(int64_t rows, const TapOffsets&, const SplitOperand&, const BFloat16* b, int64_t begin,
                               int64_t end, float* out);
inline MultiplySplit multiply_split_for(int vectors, int parts) {
  if (parts == 3) return vectors == 1 ? multiply_split<1, 3> : multiply_split<2, 3>;
  return vectors == 1 ? multiply_split<1, 2> : multiply_split<2, 2>;
}
