// Floats in parts, pairs of pixels of the weight gradient through AMX: as amx_pixels.h, but a unit is a pair of parts,
// and a block's products are summed by themselves: longer chains have larger errors. Included inside an unnamed
// namespace after conv/weight_body.h. Source: docs/convolution.md.
#pragma once

#include "simd/amx_parts.h"
#include "simd/amx_pixels.h"

template <int kSplit>
struct SplitPairs : TilePairs {
  using Seen = Magnitudes;
  static constexpr int kParts = kSplit;

  static void pack(Unit* p, I::V v, I::V w, int64_t part) {
#pragma GCC unroll 3
    for (int i = 0; i < kParts; ++i, p += part) {
      const auto halves = bit_copy<__m512i>(_mm512_cvtne2ps_pbh(w, v));
      store(p, in_pairs(halves));
      v = without(v, _mm512_castsi512_si256(halves));
      w = without(w, _mm512_extracti64x4_epi64(halves, 1));
    }
  }

  static void multiply(AmxState& state, int64_t filters, int vectors, const Tile<SplitPairs>& t) {
    state.set_rows(filters);
    alignas(64) float sums[kMr * kNr * kWidth];
    vectors == 1 ? multiply_pixels<1>(filters, t, sums) : multiply_pixels<2>(filters, t, sums);
    for (int64_t i = 0; i < filters; ++i) {
      for (int64_t j = i * kNr * kWidth; j < (i * kNr + vectors) * kWidth; j += kWidth) {
        const auto sum = I::load(sums + j);
        I::store(t.sums + j, t.first ? sum : I::add(I::load(t.sums + j), sum));
      }
    }
  }

  template <int kVectors>
  static void multiply_pixels(int64_t filters, const Tile<SplitPairs>& t, float* sums) {
    constexpr int64_t kPart = kNr * kWidth * 4, kRow = kPart, kLine = 64;  // bytes; rows: of sums
    const bool both = filters > 16;
    tiles_read_memory();
    zero_sums();
    const Unit* dz = t.dz;
    const char *ahead = t.ahead, *own_sums = reinterpret_cast<const char*>(t.sums);
    const int64_t part = filters * kGroup, group = kParts * part;  // of dz
    for_groups(t, filters * kRow, [&](const Unit* a, int64_t pitch, int64_t lines) FR_INLINE {
      LinesAhead<kGroup * kMr * kParts * 4, products_of(kParts)> next(reinterpret_cast<const char*>(dz + group));
      ahead = fetch_ahead(ahead, t.ahead_step);
      for (; lines > 0; --lines, own_sums += kLine) __builtin_prefetch(own_sums, 1);
      multiply_parts<kVectors, kParts>({reinterpret_cast<const char*>(dz), part * 4, kGroup * 4},
                                       {reinterpret_cast<const char*>(a), kPart, pitch}, both, [&] { next.next(); });
      dz += group;
    });
    store_sums<kVectors>(sums, kRow, both);
  }
};
