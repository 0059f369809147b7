// Floats to pairs of bfloat16. Included inside an unnamed namespace.
#pragma once

#include "simd/vec_avx512.h"

// Sixteen values for low halves and sixteen for high ones, in this order, become pairs.
inline __m512i in_pairs(__m512i halves) {
  static constexpr uint16_t kLane[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_loadu_si512(kLane), halves);
}

// The products of pairs take denormals for zero, so it does not matter that this conversion does.
inline __m512i pairs_of(__m512 low, __m512 high) { return in_pairs(bit_copy<__m512i>(_mm512_cvtne2ps_pbh(high, low))); }
