// Device functions: warp operations, atomics, caching loads, bit casts, fast arithmetic.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

namespace fused_resnet::simt {

template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

// T: 32 or 64 bits.
template <class T>
T shuffle(unsigned mask, T value, int source, bool inside) {
  const uint64_t bits = std::bit_cast<BitsOf<T>>(value);
  const uint64_t result = warp_operation(WarpOp::kShuffle, mask, bits, inside ? source : lane());
  return std::bit_cast<T>(static_cast<BitsOf<T>>(result));
}

// The last lane of the running thread's segment of `width` lanes.
inline int segment_end(int width) { return lane() | (width - 1); }
inline int segment_begin(int width) { return lane() & ~(width - 1); }

}  // namespace fused_resnet::simt

// A source outside the segment gives the lane's own value, as in the PTX manual's `shfl`.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  using namespace fused_resnet::simt;
  return shuffle(mask, value, segment_begin(width) | (source & (width - 1)), true);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  using namespace fused_resnet::simt;
  const int source = lane() ^ lane_mask;
  return shuffle(mask, value, source, source <= segment_end(width));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  using namespace fused_resnet::simt;
  const int source = lane() + static_cast<int>(delta);
  return shuffle(mask, value, source, source <= segment_end(width));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  using namespace fused_resnet::simt;
  const int source = lane() - static_cast<int>(delta);
  return shuffle(mask, value, source, source >= segment_begin(width));
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  fused_resnet::simt::warp_operation(fused_resnet::simt::WarpOp::kSync, mask, 0, 0);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(
      fused_resnet::simt::warp_operation(fused_resnet::simt::WarpOp::kBallot, mask, predicate != 0, 0));
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// Threads take turns: no two are inside at once.
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old + value;
  return old;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <class T>
void __stcg(T* address, std::type_identity_t<T> value) {
  *address = value;
}

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }

inline float __expf(float value) { return std::exp(value); }
inline float __logf(float value) { return std::log(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float value) { return 1 / value; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float rsqrtf(float value) { return 1 / std::sqrt(value); }
inline double rsqrt(double value) { return 1 / std::sqrt(value); }

// Of equal types only, so that nothing is narrowed here that CUDA would have widened.
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
