// Vector types of the AVX-512 emulation: the compiler's names, plain C++ inside.
//
// A register is an array of bytes; lanes<T>() gives it an element type and
// from_lanes() takes it back, as an intrinsic's suffix (ps, pd, epi16 ...) does.
#pragma once

#ifdef _IMMINTRIN_H_INCLUDED
#error "the emulation replaces <immintrin.h>: a file may include one of the two"
#endif

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace avx512_emulation {

enum class Kind { kInteger, kFloat, kDouble, kBFloat16 };

template <int kBytes, Kind kKind>
struct alignas(kBytes) Register {
  std::array<unsigned char, kBytes> bytes;
};

template <class T, class V>
inline constexpr int kLanes = static_cast<int>(sizeof(V) / sizeof(T));

template <class T, class V>
inline std::array<T, kLanes<T, V>> lanes(const V& v) {
  return std::bit_cast<std::array<T, kLanes<T, V>>>(v);
}

template <class V, class T, size_t kCount>
inline V from_lanes(const std::array<T, kCount>& values) {
  return std::bit_cast<V>(values);
}

inline bool bit(uint64_t mask, int lane) { return (mask >> lane) & 1; }

// result lane i = f(i).
template <class T, class V, class F>
inline V generate(F f) {
  std::array<T, kLanes<T, V>> out;
  for (int i = 0; i < kLanes<T, V>; ++i) out[i] = static_cast<T>(f(i));
  return from_lanes<V>(out);
}

template <class T, class V, class F>
inline V map(const V& va, F f) {
  const auto a = lanes<T>(va);
  return generate<T, V>([&](int i) { return f(a[i]); });
}
template <class T, class V, class F>
inline V map(const V& va, const V& vb, F f) {
  const auto a = lanes<T>(va), b = lanes<T>(vb);
  return generate<T, V>([&](int i) { return f(a[i], b[i]); });
}
template <class T, class V, class F>
inline V map(const V& va, const V& vb, const V& vc, F f) {
  const auto a = lanes<T>(va), b = lanes<T>(vb), c = lanes<T>(vc);
  return generate<T, V>([&](int i) { return f(a[i], b[i], c[i]); });
}

// Lane i of `taken` where bit i is set, else of `otherwise`.
template <class T, class V>
inline V blend(uint64_t mask, const V& otherwise, const V& taken) {
  const auto a = lanes<T>(otherwise), b = lanes<T>(taken);
  return generate<T, V>([&](int i) { return bit(mask, i) ? b[i] : a[i]; });
}

template <class V, class T>
inline V broadcast(T value) {
  return generate<T, V>([&](int) { return value; });
}

// The instruction faults when the address is not a multiple of the vector.
template <class V>
inline void require_aligned(const void* p, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V) == 0) return;
  std::fprintf(stderr, "avx512 emulation: %s at %p is not %zu-byte aligned\n", what, p, sizeof(V));
  std::abort();
}

template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
inline void store(void* p, const V& v) {
  std::memcpy(p, &v, sizeof v);
}

// Lanes that are masked off are not touched in memory, so a sanitizer or a guard
// page sees exactly what the instruction would read or write.
template <class T, class V>
inline V mask_load(const V& otherwise, uint64_t mask, const void* p) {
  auto out = lanes<T>(otherwise);
  for (int i = 0; i < kLanes<T, V>; ++i) {
    if (bit(mask, i)) std::memcpy(&out[i], static_cast<const T*>(p) + i, sizeof(T));
  }
  return from_lanes<V>(out);
}

template <class T, class V>
inline void mask_store(void* p, uint64_t mask, const V& v) {
  const auto values = lanes<T>(v);
  for (int i = 0; i < kLanes<T, V>; ++i) {
    if (bit(mask, i)) std::memcpy(static_cast<T*>(p) + i, &values[i], sizeof(T));
  }
}

template <class T, class V, class F>
inline uint64_t mask_where(const V& a, const V& b, F f) {
  const auto x = lanes<T>(a), y = lanes<T>(b);
  uint64_t mask = 0;
  for (int i = 0; i < kLanes<T, V>; ++i) mask |= static_cast<uint64_t>(f(x[i], y[i])) << i;
  return mask;
}

// Lane i of the result = f(lane i); both registers hold as many lanes.
template <class From, class To, class VTo, class VFrom, class F>
inline VTo convert(const VFrom& in, F f) {
  static_assert(kLanes<From, VFrom> == kLanes<To, VTo>);
  const auto values = lanes<From>(in);
  return generate<To, VTo>([&](int i) { return f(values[i]); });
}

// In the order compilers expand _mm512_reduce_add: the upper half onto the lower.
template <class T, size_t kCount>
inline T halving_sum(std::array<T, kCount> a) {
  for (size_t half = kCount / 2; half > 0; half /= 2) {
    for (size_t i = 0; i < half; ++i) a[i] = a[i + half] + a[i];
  }
  return a[0];
}

}  // namespace avx512_emulation

using __m128i = avx512_emulation::Register<16, avx512_emulation::Kind::kInteger>;
using __m256i = avx512_emulation::Register<32, avx512_emulation::Kind::kInteger>;
using __m512i = avx512_emulation::Register<64, avx512_emulation::Kind::kInteger>;
using __m256 = avx512_emulation::Register<32, avx512_emulation::Kind::kFloat>;
using __m512 = avx512_emulation::Register<64, avx512_emulation::Kind::kFloat>;
using __m512d = avx512_emulation::Register<64, avx512_emulation::Kind::kDouble>;
using __m256bh = avx512_emulation::Register<32, avx512_emulation::Kind::kBFloat16>;
using __m512bh = avx512_emulation::Register<64, avx512_emulation::Kind::kBFloat16>;
using __mmask8 = uint8_t;
using __mmask16 = uint16_t;
using __mmask32 = uint32_t;
