// A square of 32-bit lanes, turned in registers. Vectors of the compiler's own, so that every instruction set and the
// emulation share it. Included inside an unnamed namespace.
#pragma once

template <int kWidth>
struct LaneTypes;
template <>
struct LaneTypes<8> {
  typedef int32_t V __attribute__((vector_size(32)));
};
template <>
struct LaneTypes<16> {
  typedef int32_t V __attribute__((vector_size(64)));
};

// 0 to kCount - 1 as a list; the standard library's templates would be shared with other instruction sets' files.
template <int... kLane>
struct LaneList {};
template <int kCount, int... kLane>
struct CountedLanes : CountedLanes<kCount - 1, kCount - 1, kLane...> {};
template <int... kLane>
struct CountedLanes<0, kLane...> {
  using List = LaneList<kLane...>;
};

// Lanes of a, and behind them of b.
template <class V, int... kFrom>
FR_INLINE inline V shuffle(V a, V b, LaneList<kFrom...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kFrom...);
#else  // which g++ has from 12 on
  constexpr V kLanes = {kFrom...};
  return __builtin_shuffle(a, b, kLanes);
#endif
}

// Lanes whose number has the bit kHalf come from b, the others from a; from the other side of that bit.
template <int kHalf, class V, int... kLane>
FR_INLINE inline V lower_halves(V a, V b, LaneList<kLane...>) {
  constexpr int kWidth = sizeof...(kLane);
  return shuffle(a, b, LaneList<(kLane & kHalf ? kWidth + kLane - kHalf : kLane)...>());
}
template <int kHalf, class V, int... kLane>
FR_INLINE inline V upper_halves(V a, V b, LaneList<kLane...>) {
  constexpr int kWidth = sizeof...(kLane);
  return shuffle(a, b, LaneList<(kLane & kHalf ? kWidth + kLane : kLane + kHalf)...>());
}

// Exchanges the off-diagonal quarters of every square of 2 kHalf rows, then those of its quarters.
template <int kWidth, int kHalf = kWidth / 2>
FR_INLINE inline void transpose(typename LaneTypes<kWidth>::V (&row)[kWidth]) {
  constexpr typename CountedLanes<kWidth>::List kLanes{};
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (i & kHalf) continue;
    const auto a = row[i], b = row[i + kHalf];
    row[i] = lower_halves<kHalf>(a, b, kLanes);
    row[i + kHalf] = upper_halves<kHalf>(a, b, kLanes);
  }
  if constexpr (kHalf > 1) transpose<kWidth, kHalf / 2>(row);
}
