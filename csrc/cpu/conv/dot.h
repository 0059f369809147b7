// One step of a convolution's inner loop: a register of accumulators, plus one operand from each side. Included inside
// an unnamed namespace after the vector headers.
#pragma once

#include "conv/operand_body.h"

// What a thread sets up for some tiles and others.
struct NoState {
  void set_rows(int64_t) {}
};

// Steps that floats are summed over before sums are added to sums: an error grows with the root of a chain's length,
// and sums of 4,608 products are common. Winograd's transforms make more of what is rounded. Shorter chains take time.
constexpr int64_t kChain = 64, kWinogradChain = 24;

// Floats or doubles: one channel a step. kSteps: of a chain. 0: all are one, for doubles, and for what is rounded to
// fewer bits in the end.
template <class I, int64_t kSteps = 0>
struct RealDot {
  using Ops = I;
  using C = typename I::S;  // the compute type
  using V = typename I::V;
  static constexpr int kPair = 1;  // channels that lie side by side in a packed weight
  static constexpr int kStep = 1;  // channels of a group are padded to a multiple of it
  static constexpr int64_t kChain = kSteps;
  static constexpr bool kTiles = false;
  static constexpr bool kFlushes = false;  // denormal sums to zero
  using State = NoState;

  static V weights(const C* p) { return I::load(p); }
  static V broadcast(const C* p) { return I::set1(*p); }
  static V fma(V a, V b, V sum) { return I::fma(a, b, sum); }
  // `count` filters of one channel, contiguous in the weight.
  template <class T>
  static void pack_row(const T* row, int64_t, int64_t count, C* to) {
    for_columns<I::kWidth>(0, count, [&](int64_t f, int64_t n) FR_INLINE { write<I>(to + f, read<I>(row + f, n), n); });
  }
};
