// Walking a row in vectors. The last, partial one goes through a small buffer, so
// that no lane outside the row is read or written. Included inside an unnamed
// namespace.
#pragma once

#include "simd/storage.h"

// Loop bodies must be inlined: only then is a full vector's `n` a constant.
#define FR_INLINE __attribute__((always_inline))

// Calls f(column, n) for every vector of a row, n < width only for the last.
template <int kWidth, class F>
FR_INLINE inline void for_columns(int64_t begin, int64_t end, F f) {
  int64_t column = begin;
  for (; column + kWidth <= end; column += kWidth) f(column, static_cast<int64_t>(kWidth));
  if (column < end) f(column, end - column);
}

template <class I, class T>
inline typename I::V load_n(const T* p, int64_t n) {
  T lane[I::kWidth] = {};
  for (int64_t i = 0; i < n; ++i) lane[i] = p[i];
  return I::load(lane);
}

template <class I, class T>
inline void store_n(T* p, typename I::V v, int64_t n) {
  T lane[I::kWidth];
  I::store(lane, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lane[i];
}

// Bits [column, column + n) of a mask row whose bytes before `column` are done.
template <int kWidth>
inline void store_bits(uint8_t* row, int64_t column, int64_t n, unsigned bits) {
  uint8_t* byte = row + column / 8;
  if constexpr (kWidth == 16) {
    byte[0] = static_cast<uint8_t>(bits);
    if (n > 8) byte[1] = static_cast<uint8_t>(bits >> 8);
  } else if constexpr (kWidth == 8) {
    *byte = static_cast<uint8_t>(bits);
  } else {
    const unsigned shift = static_cast<unsigned>(column % 8);
    *byte = static_cast<uint8_t>(shift == 0 ? bits : (*byte | (bits << shift)));
  }
}

template <int kWidth>
inline unsigned load_bits(const uint8_t* row, int64_t column, int64_t n) {
  const uint8_t* byte = row + column / 8;
  if constexpr (kWidth == 16) {
    return byte[0] | (n > 8 ? static_cast<unsigned>(byte[1]) << 8 : 0u);
  } else {
    return static_cast<unsigned>(*byte) >> (column % 8);
  }
}
