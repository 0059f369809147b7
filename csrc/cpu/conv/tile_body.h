// The register tile: up to kTile positions times one or two vectors of filters, summed over taps and channels. Included
// inside an unnamed namespace.
#pragma once

// The taps of a convolution as offsets into an operand, in elements.
struct TapOffsets {
  int rows = 0, cols = 0;
  int64_t row[kMaxTaps] = {}, col[kMaxTaps] = {};
};

// Memory to bring nearer while a tile is computed: `step` bytes more for each step of its channels.
struct Ahead {
  const char* at = nullptr;
  int64_t step = 0;
};

// A register tile's finished chains of additions.
template <class I, int kRows, int kVectors>
class Chains {
  using V = typename I::V;
  using S = typename I::S;

 public:
  // Memory that the compiler knows nothing of: it would keep vectors of it in registers, and the weights' out of them.
  FR_INLINE Chains() { asm("" : "+r"(at_) : : "memory"); }
  Chains(const Chains&) = delete;
  Chains& operator=(const Chains&) = delete;
  // Leaves `sum` zero.
  FR_INLINE void take(V (&sum)[kRows][kVectors]) {
    any_ ? each<true>(sum) : each<false>(sum);
    any_ = true;
  }
  FR_INLINE void add_to(V (&sum)[kRows][kVectors]) const {
    if (!any_) return;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sum[i][j] = I::add(I::load(at(i, j)), sum[i][j]);
    }
  }

 private:
  FR_INLINE S* at(int i, int j) const { return at_ + (i * kVectors + j) * I::kWidth; }
  template <bool kAdd>
  FR_INLINE void each(V (&sum)[kRows][kVectors]) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        I::store(at(i, j), kAdd ? I::add(I::load(at(i, j)), sum[i][j]) : sum[i][j]);
        sum[i][j] = I::zero();
      }
    }
  }

  alignas(64) S total_[kRows * kVectors * I::kWidth];
  S* at_ = total_;
  bool any_ = false;
};

// done(sum[kRows][kVectors]) of positions a + i * step and filters; `channels` is a multiple of kPair. 14 x 2 vectors
// fill AVX-512's 32 registers: 16 loads for 28 multiplications, so that two loads a cycle keep up.
template <class D, int kRows, int kVectors, class F>
FR_INLINE inline void accumulate(const TapOffsets& taps, const typename D::C* a, int64_t step, const typename D::C* b,
                                 int64_t channels, Ahead ahead, F done) {
  using C = typename D::C;
  constexpr int kWidth = D::Ops::kWidth, kPair = D::kPair;
  constexpr int kBases = (kRows + 2) / 3;  // [base], [base + step], [base + 2 step]: what one address can say
  // Asking for a page that is not there would cost a walk through the page tables each time.
  if (ahead.at == nullptr) ahead.at = reinterpret_cast<const char*>(b);
  typename D::V sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sum[i][j] = D::Ops::zero();
  }
  static_assert(D::kChain % kPair == 0);
  constexpr bool kChained = D::kChain > 0;
  [[maybe_unused]] Chains<typename D::Ops, kRows, kVectors> chains;
  [[maybe_unused]] int64_t left = D::kChain;  // of this chain
  for (int t = 0; t < taps.rows; ++t) {
    for (int u = 0; u < taps.cols; ++u) {
      const C* base[kBases];
#pragma GCC unroll 16
      for (int i = 0; i < kBases; ++i) base[i] = a + taps.row[t] + taps.col[u] + 3 * i * step;
      for (int64_t c = 0, end = channels; c < channels; end = channels) {
        if constexpr (kChained) {
          if (left == 0) chains.take(sum), left = D::kChain;
          if (left < channels - c) end = c + left;
          left -= end - c;
        }
        for (; c < end; c += kPair) {
          decltype(D::weights(b)) w[kVectors];
#pragma GCC unroll 2
          for (int j = 0; j < kVectors; ++j) w[j] = D::weights(b + j * kWidth * kPair);
          b += kVectors * kWidth * kPair;
          __builtin_prefetch(ahead.at, 0, 2);
          ahead.at += ahead.step;
#pragma GCC unroll 16
          for (int i = 0; i < kRows; ++i) {
            const auto v = D::broadcast(base[i / 3] + (i % 3) * step);
#pragma GCC unroll 2
            for (int j = 0; j < kVectors; ++j) sum[i][j] = D::fma(v, w[j], sum[i][j]);
          }
#pragma GCC unroll 16
          for (int i = 0; i < kBases; ++i) base[i] += kPair;
        }
      }
    }
  }
  if constexpr (kChained) chains.add_to(sum);
  done(sum);
}

template <class I, int kRows, int kVectors>
FR_INLINE inline void store_sums(const typename I::V (&sum)[kRows][kVectors], typename I::S* out) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) I::store(out + (i * kVectors + j) * I::kWidth, sum[i][j]);
  }
}

// The sums in memory: out[i][filter].
template <class D, int kRows, int kVectors>
inline void multiply(const TapOffsets& taps, const typename D::C* a, int64_t step, const typename D::C* b,
                     int64_t channels, typename D::Ops::S* out, Ahead ahead) {
  accumulate<D, kRows, kVectors>(taps, a, step, b, channels, ahead,
                                 [&](const auto& sum) FR_INLINE { store_sums<typename D::Ops>(sum, out); });
}

template <class D>
using Multiply = void (*)(const TapOffsets&, const typename D::C*, int64_t, const typename D::C*, int64_t,
                          typename D::Ops::S*, Ahead);

template <class D, int kTile, int kVectors>
inline Multiply<D> multiply_rows(int64_t rows) {
  if constexpr (kTile > 1) {
    if (rows < kTile) return multiply_rows<D, kTile - 1, kVectors>(rows);
  }
  return &multiply<D, kTile, kVectors>;
}

// The tile of `rows` positions, 1 to kTile, and one or two vectors of filters.
template <class D, int kTile>
inline void multiply_tile(typename D::State* state, int vectors, int64_t rows, const TapOffsets& taps,
                          const typename D::C* a, int64_t step, const typename D::C* b, int64_t channels,
                          typename D::Ops::S* out, Ahead ahead) {
  if constexpr (D::kTiles) {
    state->set_rows(rows);
    vectors == 1 ? multiply_tiles<1>(rows, taps, a, step, b, channels, out, ahead)
                 : multiply_tiles<2>(rows, taps, a, step, b, channels, out, ahead);
  } else {
    const Multiply<D> multiply = vectors == 1 ? multiply_rows<D, kTile, 1>(rows) : multiply_rows<D, kTile, 2>(rows);
    multiply(taps, a, step, b, channels, out, ahead);
  }
}
