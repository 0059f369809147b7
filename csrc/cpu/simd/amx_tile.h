// Pairs of bfloat16 channels through AMX: 2 x 2 tiles of 16 positions and 16 filters, 32 channels a step. Included
// inside an unnamed namespace. Source: docs/convolution.md.
#pragma once

#include "simd/amx_unit.h"
#include "simd/bf16_dot.h"

struct AmxDot : Bf16Dot {
  using State = AmxState;
  static constexpr int kStep = 32;
  static constexpr bool kTiles = true;

  // `count` elements and zeros up to `padded`, a multiple of kStep.
  static void copy_padded(const BFloat16* from, int64_t count, int64_t padded, BFloat16* to) {
    for (int64_t i = 0; i < padded; i += kStep) {
      const int64_t left = count - i;
      const auto lanes = static_cast<__mmask32>(left >= kStep ? ~0u : left > 0 ? (1u << left) - 1 : 0);
      _mm512_storeu_si512(to + i, _mm512_maskz_loadu_epi16(lanes, from + i));
    }
  }
};

// As `multiply` of conv/tile_body.h, for 1 to 32 positions.
template <int kVectors>
inline void multiply_tiles(int64_t rows, const TapOffsets& taps, const BFloat16* a, int64_t step, const BFloat16* b,
                           int64_t channels, float* out, Ahead ahead) {
  constexpr int64_t kStep = AmxDot::kStep, kRow = kVectors * 64;  // bytes of a row of weights, and of sums
  constexpr int64_t kLine = 64;
  const int64_t ahead_step = ahead.step * kStep / AmxDot::kPair;
  const bool both = rows > 16;
  tiles_read_memory();
  zero_sums();
  for (int t = 0; t < taps.rows; ++t) {
    for (int u = 0; u < taps.cols; ++u) {
      const BFloat16* p = a + taps.row[t] + taps.col[u];
      for (int64_t c = 0; c < channels; c += kStep, p += kStep, b += kStep * kVectors * 16) {
        for (int64_t i = 0; i < ahead_step; i += kLine) __builtin_prefetch(ahead.at + i, 0, 2);
        ahead.at += ahead_step;
        multiply_step<kVectors, Passing::kPairs>(p, step * 2, b, kRow, both);
      }
    }
  }
  store_sums<kVectors>(out, kRow, both);
}
