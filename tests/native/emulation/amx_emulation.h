// AMX tiles (TILE, BF16) in plain C++: eight a thread, as their configuration says. What the processor would fault on,
// and what it would silently read as zero, ends the program; a load or store touches the configured rows and bytes and
// no others, so that AddressSanitizer sees what the instruction would. Semantics: Intel's manual, volume 2.
#pragma once

#include "avx512_emulation.h"

namespace avx512_emulation {

struct Tile {
  int rows = 0, row_bytes = 0;
  unsigned char data[16][64] = {};
};

struct TileUnit {
  bool configured = false;
  Tile tile[8];
};
inline thread_local TileUnit tile_unit;

[[noreturn]] inline void tile_fault(const char* what) {
  std::fprintf(stderr, "AMX emulation: %s\n", what);
  std::abort();
}

// Tile number `index`, which must have rows.
inline Tile& tile(int index) {
  if (!tile_unit.configured) tile_fault("no configuration is loaded");
  if (index < 0 || index > 7) tile_fault("no such tile");
  Tile& t = tile_unit.tile[index];
  if (t.rows == 0) tile_fault("this tile is not configured");
  return t;
}

// 64 bytes: palette, first row, 14 reserved; bytes of a row of 16 tiles, two each; rows of 16 tiles.
inline void load_tile_config(const void* config) {
  unsigned char bytes[64];
  std::memcpy(bytes, config, sizeof bytes);
  if (bytes[0] != 1 || bytes[1] != 0) tile_fault("palette other than 1, or a first row");
  for (int i = 2; i < 16; ++i) {
    if (bytes[i] != 0) tile_fault("a reserved byte is not zero");
  }
  tile_unit = {};
  for (int i = 0; i < 16; ++i) {
    const int row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8, rows = bytes[48 + i];
    if (i > 7 && (rows != 0 || row_bytes != 0)) tile_fault("a ninth tile");
    if (rows > 16 || row_bytes > 64) tile_fault("more than 16 rows of 64 bytes");
    if ((rows == 0) != (row_bytes == 0)) tile_fault("rows without bytes, or bytes without rows");
    if (i > 7) continue;
    tile_unit.tile[i].rows = rows;
    tile_unit.tile[i].row_bytes = row_bytes;
  }
  tile_unit.configured = true;
}

// C (rows x columns of float) += A (rows x pairs) * B (pairs x columns). Even and odd elements are summed apart.
inline void multiply_bf16_tiles(Tile& c, const Tile& a, const Tile& b) {
  if (&c == &a || &c == &b || &a == &b) tile_fault("the same tile twice");
  const int pairs = a.row_bytes / 4, columns = c.row_bytes / 4;
  if (a.rows != c.rows || b.rows != pairs || b.row_bytes != c.row_bytes) tile_fault("tiles that do not fit together");
  const auto half = [](const Tile& t, int row, int i) {
    uint16_t value;
    std::memcpy(&value, t.data[row] + 2 * i, sizeof value);
    return value;
  };
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < columns; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < pairs; ++k) {
        even = add_product(even, half(a, m, 2 * k), half(b, k, 2 * n));
        odd = add_product(odd, half(a, m, 2 * k + 1), half(b, k, 2 * n + 1));
      }
      std::memcpy(&sum, c.data[m] + 4 * n, sizeof sum);
      sum = flushed(flushed(sum) + flushed(even + odd));
      std::memcpy(c.data[m] + 4 * n, &sum, sizeof sum);
    }
  }
}

}  // namespace avx512_emulation

FR_EMULATED void _tile_loadconfig(const void* config) { avx512_emulation::load_tile_config(config); }
FR_EMULATED void _tile_release() { avx512_emulation::tile_unit = {}; }
FR_EMULATED void _tile_zero(int to) {
  avx512_emulation::Tile& t = avx512_emulation::tile(to);
  std::memset(t.data, 0, sizeof t.data);
}
FR_EMULATED void _tile_loadd(int to, const void* base, int64_t stride) {
  avx512_emulation::Tile& t = avx512_emulation::tile(to);
  std::memset(t.data, 0, sizeof t.data);
  const auto* from = static_cast<const unsigned char*>(base);
  for (int i = 0; i < t.rows; ++i) std::memcpy(t.data[i], from + i * stride, static_cast<size_t>(t.row_bytes));
}
FR_EMULATED void _tile_stream_loadd(int to, const void* base, int64_t stride) { _tile_loadd(to, base, stride); }
FR_EMULATED void _tile_stored(int from, void* base, int64_t stride) {
  const avx512_emulation::Tile& t = avx512_emulation::tile(from);
  auto* to = static_cast<unsigned char*>(base);
  for (int i = 0; i < t.rows; ++i) std::memcpy(to + i * stride, t.data[i], static_cast<size_t>(t.row_bytes));
}
FR_EMULATED void _tile_dpbf16ps(int c, int a, int b) {
  using avx512_emulation::tile;
  avx512_emulation::multiply_bf16_tiles(tile(c), tile(a), tile(b));
}
