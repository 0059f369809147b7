// The tile unit: its configuration, and one step of 2 x 2 tiles. Included inside an unnamed namespace.
#pragma once

#include "simd/storage.h"

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
    tiles_read_memory();
    _tile_loadconfig(&config);
  }

 private:
  int64_t rows_ = 0;
};

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// The sums of up to 32 rows, which lie `pitch` bytes apart, of 16 or 32 floats.
template <int kVectors>
inline void store_sums(float* out, int64_t pitch, bool both) {
  _tile_stored(0, out, pitch);
  if constexpr (kVectors == 2) _tile_stored(1, out + 16, pitch);
  if (!both) return;
  float* below = out + 4 * pitch;  // 16 rows
  _tile_stored(2, below, pitch);
  if constexpr (kVectors == 2) _tile_stored(3, below + 16, pitch);
}

// Which operand of a step passes by, while tiles meet the other one again: it is loaded with the hint that it is read
// once, and leaves the other where it is in the first-level cache.
enum class Passing { kValues, kPairs };

// The number of a tile must be a literal.
#define FR_LOAD_TILE(tile, passes, at, pitch) \
  do {                                        \
    if constexpr (passes) {                   \
      _tile_stream_loadd(tile, at, pitch);    \
    } else {                                  \
      _tile_loadd(tile, at, pitch);           \
    }                                         \
  } while (false)

// Adds the products of up to 32 rows of 32 values, and 16 rows of one or two times 16 pairs; rows lie `pitch` bytes
// apart. A tile that is zeroed right after its last use breaks a dependency that the processor would otherwise keep to
// the next load: measured 1.4 times as fast on Sapphire Rapids.
template <int kVectors, Passing kPassing>
FR_INLINE inline void multiply_step(const void* values, int64_t a_pitch, const void* pairs, int64_t b_pitch,
                                    bool both) {
  constexpr bool kValuesPass = kPassing == Passing::kValues, kPairsPass = !kValuesPass;
  const char *a = static_cast<const char*>(values), *b = static_cast<const char*>(pairs);
  FR_LOAD_TILE(4, kValuesPass, a, a_pitch);
  FR_LOAD_TILE(6, kPairsPass, b, b_pitch);
  if constexpr (kVectors == 2) FR_LOAD_TILE(7, kPairsPass, b + 64, b_pitch);
  if (both) FR_LOAD_TILE(5, kValuesPass, a + 16 * a_pitch, a_pitch);
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
#undef FR_LOAD_TILE
