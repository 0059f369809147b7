// Pairs of bfloat16 pixels of the weight gradient through AMX: 2 x 2 tiles of 16 filters and 16 channels, 32 pixels a
// step. Included inside an unnamed namespace after conv/weight_body.h. Source: docs/convolution.md.
#pragma once

#include "simd/amx_unit.h"
#include "simd/pixel_pairs.h"

struct TilePairs : PixelPairs<kWeightAmx.filters> {
  using State = AmxState;
  static constexpr int kGroup = kWeightAmx.group;

  // Rows of filters become columns: to[filter][step of the group].
  static void turn(const Unit* from, int64_t pitch, int64_t steps, int64_t filters, Unit* to) {
    if (steps == 8) return turn_eight(from, pitch, filters, to);
    for (int64_t i = 0; i < steps; ++i) {
      for (int64_t f = 0; f < filters; ++f) to[f * kGroup + i] = from[i * pitch + f];
    }
  }
  static void turn_eight(const Unit* from, int64_t pitch, int64_t filters, Unit* to) {
    for (int64_t first = 0; first < filters; first += kWidth) {
      alignas(64) Unit turned[2][4][16];  // [four steps][filter modulo 4][filter / 4, step]
      for (int half = 0; half < 2; ++half) {
        const Unit* row = from + 4 * half * pitch + first;
        const __m512i a = load(row), b = load(row + pitch), c = load(row + 2 * pitch), d = load(row + 3 * pitch);
        const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
        const __m512i ab_high = _mm512_unpackhi_epi32(a, b), cd_high = _mm512_unpackhi_epi32(c, d);
        store(turned[half][0], _mm512_unpacklo_epi64(ab, cd));
        store(turned[half][1], _mm512_unpackhi_epi64(ab, cd));
        store(turned[half][2], _mm512_unpacklo_epi64(ab_high, cd_high));
        store(turned[half][3], _mm512_unpackhi_epi64(ab_high, cd_high));
      }
      const int64_t count = filters - first < kWidth ? filters - first : kWidth;
      for (int64_t f = 0; f < count; ++f) {
        for (int half = 0; half < 2; ++half) {
          __builtin_memcpy(to + (first + f) * kGroup + 4 * half, turned[half][f % 4] + f / 4 * 4, 4 * sizeof(Unit));
        }
      }
    }
  }

  static void multiply(AmxState& state, int64_t filters, int vectors, const Tile<TilePairs>& t) {
    state.set_rows(filters);
    vectors == 1 ? multiply_pixels<1>(filters, t) : multiply_pixels<2>(filters, t);
  }

  // A line for every step of a group. Where nothing is left to ask for, loads of tiles have the ports to themselves.
  static FR_INLINE const char* fetch_ahead(const char* at, int64_t step) {
    if (step == 0) return at;
#pragma GCC unroll 16
    for (int i = 0; i < kGroup; ++i, at += step) __builtin_prefetch(at, 0, 2);
    return at;
  }
  // step(a, its pitch in bytes, lines) for every group of steps; `lines` is this group's share of `bytes`.
  template <class T, class F>
  static FR_INLINE void for_groups(const T& t, int64_t bytes, F step) {
    constexpr int64_t kStep = T::kParts * kNr * kWidth, kLine = 64;
    const int64_t whole = t.steps / kGroup, rest = t.steps % kGroup, left = t.runs * rest;
    const int64_t groups = t.runs * whole + (left + kGroup - 1) / kGroup;
    const int64_t lines = (bytes / kLine + groups - 1) / groups;
    for (int64_t run = 0; run < t.runs; ++run) {
      const Unit* a = t.a + run * t.a_run;
      for (int64_t i = 0; i < whole; ++i, a += kGroup * t.a_step) step(a, t.a_step * 4, lines);
    }
    // What is left of the runs shares groups, and is copied. What follows the last of it in memory is not to be
    // multiplied, not even by zero: it may be a NaN.
    alignas(64) Unit last[kGroup * kStep];
    int64_t run = 0, at = 0;
    for (int64_t begin = 0; begin < left; begin += kGroup) {
      if (left - begin < kGroup) __builtin_memset(last, 0, sizeof(last));
      for (int64_t i = 0; i < kGroup && begin + i < left; ++i) {
        const Unit* from = t.a + run * t.a_run + (whole * kGroup + at) * t.a_step;
        __builtin_memcpy(last + i * kStep, from, kStep * sizeof(Unit));
        if (++at == rest) at = 0, ++run;
      }
      tiles_read_memory();
      step(last, kStep * 4, lines);
      tiles_read_memory();  // before the next group writes there
    }
  }

  template <int kVectors>
  static void multiply_pixels(int64_t filters, const Tile<TilePairs>& t) {
    constexpr int64_t kRow = kNr * kWidth * 4, kLine = 64;  // bytes
    const bool both = filters > 16;
    float *sums = t.sums, *below = sums + 4 * kRow;
    tiles_read_memory();
    if (t.first) {
      zero_sums();
    } else {
      _tile_loadd(0, sums, kRow);
      if constexpr (kVectors == 2) _tile_loadd(1, sums + 16, kRow);
      if (both) _tile_loadd(2, below, kRow);
      if constexpr (kVectors == 2) {
        if (both) _tile_loadd(3, below + 16, kRow);
      }
    }
    const Unit* dz = t.dz;
    const char *ahead = t.ahead, *next_sums = t.next_sums;
    for_groups(t, filters * kRow, [&](const Unit* a, int64_t pitch, int64_t lines) FR_INLINE {
      ahead = fetch_ahead(ahead, t.ahead_step);
      for (; lines > 0; --lines, next_sums += kLine) __builtin_prefetch(next_sums, 1);
      multiply_step<kVectors, Passing::kValues>(dz, kGroup * 4, a, pitch, both);
      dz += filters * kGroup;
    });
    store_sums<kVectors>(sums, kRow, both);
  }
};
