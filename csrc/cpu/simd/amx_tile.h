// Pairs of bfloat16 channels through AMX: 2 x 2 tiles of 16 positions and 16 filters, 32 channels a step. Included
// inside an unnamed namespace. Source: docs/convolution.md.
#pragma once

#include "simd/bf16_dot.h"

// What a thread's tile unit is set to. Tiles 0 to 3 are sums, 4 and 5 operands, 6 and 7 weights.
class AmxState {
 public:
  AmxState() = default;
  AmxState(const AmxState&) = delete;
  AmxState& operator=(const AmxState&) = delete;
  ~AmxState() {
    if (rows_ > 0) _tile_release();  // a thread that keeps tiles pays for them at every switch
  }
  void set_rows(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    struct alignas(64) Config {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config = {};
    constexpr int kAll = 16;
    const int first = static_cast<int>(rows < kAll ? rows : kAll), second = static_cast<int>(rows) - first;
    const int tile_rows[8] = {first, first, second, second, first, second, kAll, kAll};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.rows[i] = static_cast<uint8_t>(tile_rows[i] > 0 ? tile_rows[i] : 1);
      config.row_bytes[i] = 64;
    }
    _tile_loadconfig(&config);
  }

 private:
  int64_t rows_ = 0;
};

struct AmxDot : Bf16Dot {
  using State = AmxState;
  static constexpr int kStep = 32;
  static constexpr bool kTiles = true;
};

// As `multiply` of conv/tile_body.h, for 1 to 32 positions. A tile that is zeroed right after its last use breaks a
// dependency that the processor would otherwise keep to the next load: measured 1.4 times as fast on Sapphire Rapids.
template <int kVectors>
inline void multiply_tiles(int64_t rows, const TapOffsets& taps, const BFloat16* a, int64_t step, const BFloat16* b,
                           int64_t channels, float* out) {
  constexpr int64_t kStep = AmxDot::kStep, kRow = kVectors * 64;  // bytes of a row of weights, and of sums
  constexpr int64_t kAhead = 2;
  const bool both = rows > 16;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int t = 0; t < taps.rows; ++t) {
    for (int u = 0; u < taps.cols; ++u) {
      const BFloat16* p = a + taps.row[t] + taps.col[u];
      for (int64_t c = 0; c < channels; c += kStep, p += kStep, b += kStep * kVectors * 16) {
        for (int64_t line = 0; line < 16 * kVectors; ++line) {
          __builtin_prefetch(reinterpret_cast<const char*>(b + kAhead * kStep * kVectors * 16) + line * 64);
        }
        _tile_loadd(4, p, step * 2);
        _tile_loadd(6, b, kRow);
        if constexpr (kVectors == 2) _tile_loadd(7, b + 32, kRow);
        if (both) _tile_loadd(5, p + 16 * step, step * 2);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kVectors == 2) _tile_dpbf16ps(1, 4, 7);
        _tile_zero(4);
        if (both) _tile_dpbf16ps(2, 5, 6);
        _tile_zero(6);
        if constexpr (kVectors == 2) {
          if (both) _tile_dpbf16ps(3, 5, 7);
        }
        _tile_zero(5);
        if constexpr (kVectors == 2) _tile_zero(7);
      }
    }
  }
  _tile_stored(0, out, kRow);
  if constexpr (kVectors == 2) _tile_stored(1, out + 16, kRow);
  if (!both) return;
  _tile_stored(2, out + 16 * 16 * kVectors, kRow);
  if constexpr (kVectors == 2) _tile_stored(3, out + 16 * 16 * kVectors + 16, kRow);
}
