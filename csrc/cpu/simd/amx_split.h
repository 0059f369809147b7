// Convolutions of floats in parts: channels of positions and filters. Included inside an unnamed namespace. Source:
// docs/convolution.md.
#pragma once

#include "simd/amx_parts.h"
#include "simd/amx_tile.h"

// A packed operand, in elements.
struct SplitOperand {
  const BFloat16* data;
  int64_t part, step, channels;  // from one part to the next, and from one position to the next
};

// As multiply_tiles, for steps [begin, end) of all taps and channels.
template <int kVectors, int kParts>
inline void multiply_steps(int64_t rows, const TapOffsets& taps, const SplitOperand& a, const BFloat16* b,
                           int64_t begin, int64_t end, float* out) {
  constexpr int64_t kSize = kParts * kSplitStep * kVectors * 16, kRow = kVectors * 64;
  constexpr int64_t kPart = kSize / kParts, kAhead = 2;
  const bool both = rows > 16;
  tiles_read_memory();
  zero_sums();
  b += begin * kSize;
  const int64_t each = a.channels / kSplitStep;  // steps of a tap
  for (int64_t k = begin; k < end;) {
    const int64_t tap = k / each, first = k % each, last = each - first < end - k ? each : first + end - k;
    const BFloat16* p = a.data + taps.row[tap / taps.cols] + taps.col[tap % taps.cols] + first * kSplitStep;
    for (int64_t i = first; i < last; ++i, p += kSplitStep, b += kSize) {
      LinesAhead<kSize * sizeof(BFloat16), products_of(kParts)> ahead(
          reinterpret_cast<const char*>(b + kAhead * kSize));
      multiply_parts<kVectors, kParts>({reinterpret_cast<const char*>(p), a.part * 2, a.step * 2},
                                       {reinterpret_cast<const char*>(b), kPart * 2, kRow}, both,
                                       [&] { ahead.next(); });
    }
    k += last - first;
  }
  store_sums<kVectors>(out, kRow, both);
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
