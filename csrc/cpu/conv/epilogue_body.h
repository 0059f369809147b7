// What happens to a register tile before it is stored. Included inside an unnamed namespace.
#pragma once

#include "conv/operand_body.h"

// Running sums of one panel of filters over one unit of work, in registers or the first-level cache.
template <class I>
struct PanelSums {
  typename I::V shift[2], first[2], second[2];
  bool started = false;
};

// One panel of one unit: its filters are columns [column, column + count) of y.
struct PanelSpan {
  int64_t column = 0, count = 0;
};

// Bits [column, column + n) of a mask row. Groups of channels need not begin where its bytes do.
template <int kWidth>
inline unsigned mask_bits(const uint8_t* row, int64_t column, int64_t n) {
  if (column % (kWidth < 8 ? kWidth : 8) == 0) return load_bits<kWidth>(row, column, n);
  unsigned bits = 0;
  for (int64_t i = 0; i < n; ++i)
    bits |= ((static_cast<unsigned>(row[(column + i) / 8]) >> ((column + i) % 8)) & 1) << i;
  return bits;
}

template <class I, class T, Epilogue E, ActClass A>
struct Finish {
  using S = typename I::S;
  using V = typename I::V;
  const ConvArgs& g;
  const int64_t mask_bytes;

  explicit Finish(const ConvArgs& args) : g(args), mask_bytes((args.k + 7) / 8) {}

  static constexpr bool kNarrow = sizeof(T) < sizeof(S);
  static V rounded(V v) {
    T lane[I::kWidth];
    I::store(lane, v);
    return I::load(lane);
  }
  // The mean of the tile's rows without the largest and the smallest: no single value may move the shift far.
  static V near_mean(const S* values, int rows, int64_t pitch) {
    V sum = I::load(values), least = sum, most = sum;
    for (int r = 1; r < rows; ++r) {
      const V v = I::load(values + r * pitch);
      sum = I::add(sum, v);
      least = I::min(least, v);
      most = I::max(most, v);
    }
    if (rows < 3) return I::mul(sum, I::set1(S(1) / static_cast<S>(rows)));
    return I::mul(I::sub(I::sub(sum, most), least), I::set1(S(1) / static_cast<S>(rows - 2)));
  }
  V skip_at(int64_t pixel, int64_t column, int64_t n) const {
    const V v = read<I>(static_cast<const T*>(g.skip) + pixel * g.k + column, n);
    if (g.skip_mask == nullptr) return v;
    const unsigned bits = mask_bits<I::kWidth>(g.skip_mask + pixel * mask_bytes, column, n);
    return I::select(I::from_bits(bits), v, I::zero());
  }
  static V parameter(const void* array, int64_t column) { return I::load(static_cast<const S*>(array) + column); }

  // Brings what the epilogue reads beside the tile towards the core while the tile is computed.
  void prefetch(const PanelSpan& span, const int64_t* pixel, int64_t rows) const {
    if (E != Epilogue::kMaskedSums && g.skip == nullptr) return;
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = pixel[r] * g.k + span.column;
      for (int64_t i = 0; i < span.count; i += kLine) {
        if constexpr (E == Epilogue::kMaskedSums) __builtin_prefetch(static_cast<const T*>(g.z) + at + i);
        if (g.skip != nullptr) __builtin_prefetch(static_cast<const T*>(g.skip) + at + i);
      }
    }
  }

  // A tile of whole vectors that is only stored, the usual case of inference: nothing is decided for each position.
  template <int kVectors, bool kSkip>
  FR_INLINE void store_whole(int64_t column, const int64_t* pixel, int rows, const S* values) const {
    constexpr int64_t kWidth = I::kWidth;
    V bias[kVectors], slope[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      bias[j] = g.bias == nullptr ? I::zero() : parameter(g.bias, column + j * kWidth);
      slope[j] = A == ActClass::kSlope ? parameter(g.act_slope, column + j * kWidth) : I::zero();
    }
    for (int r = 0; r < rows; ++r) {
      const int64_t at = pixel[r] * g.k + column;
      V v[kVectors];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        v[j] = I::add(I::load(values + (r * kVectors + j) * kWidth), bias[j]);
        if constexpr (kSkip) v[j] = I::add(v[j], I::load(static_cast<const T*>(g.skip) + at + j * kWidth));
        v[j] = act_forward<I, A>(g.act, v[j], slope[j]);
      }
      T* to = static_cast<T*>(g.y) + at;
      if constexpr (kVectors == 2 && requires { I::store2(to, v[0], v[1]); }) {
        I::store2(to, v[0], v[1]);
      } else {
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) I::store(to + j * kWidth, v[j]);
      }
    }
  }

  // Position r of the tile is pixel[r] of y.
  FR_INLINE void tile(const PanelSpan& span, const int64_t* pixel, int rows, const S* values,
                      PanelSums<I>* sums) const {
    if constexpr (E == Epilogue::kStore) {
      if (g.vectors == 2 && span.count == 2 * I::kWidth && g.skip_mask == nullptr) {
        return g.skip == nullptr ? store_whole<2, false>(span.column, pixel, rows, values)
                                 : store_whole<2, true>(span.column, pixel, rows, values);
      }
    }
    if (g.skip == nullptr && span.count == g.vectors * I::kWidth) {
      tile_rows<true>(span, pixel, rows, values, sums);
    } else {
      tile_rows<false>(span, pixel, rows, values, sums);
    }
  }

  // kWhole: of whole vectors, and without a skip; then nothing is decided for each position.
  template <bool kWhole>
  FR_INLINE void tile_rows(const PanelSpan& span, const int64_t* pixel, int rows, const S* values,
                           PanelSums<I>* sums) const {
    const int64_t pitch = g.vectors * I::kWidth;
    for (int j = 0; j < g.vectors; ++j) {
      const int64_t column = span.column + j * I::kWidth, left = span.count - j * I::kWidth;
      if (left <= 0) break;
      const int64_t n = kWhole || left >= I::kWidth ? I::kWidth : left;
      const V bias = g.bias == nullptr ? I::zero() : parameter(g.bias, column);
      V mean, scale, shift, slope;
      if constexpr (E == Epilogue::kStore) {
        slope = A == ActClass::kSlope ? parameter(g.act_slope, column) : I::zero();
      }
      if constexpr (E == Epilogue::kMaskedSums) {
        mean = parameter(g.z_mean, column);
        scale = parameter(g.z_scale, column);
        shift = parameter(g.z_bias, column);
        slope = parameter(g.z_slope, column);
      }
      V first = sums->first[j], second = sums->second[j];
      if constexpr (E == Epilogue::kStats) {
        if (!sums->started && (kWhole || g.skip == nullptr)) {
          sums->shift[j] = I::add(near_mean(values + j * I::kWidth, rows, pitch), bias);
        } else if (!sums->started) {
          // Of what is stored, or equal values would not sum to exactly 0.
          constexpr int kMostRows = 32;
          alignas(64) S stored[kMostRows * I::kWidth];
          for (int r = 0; r < rows; ++r) {
            const V v = I::add(I::load(values + r * pitch + j * I::kWidth), bias);
            I::store(stored + r * I::kWidth, I::add(v, skip_at(pixel[r], column, n)));
          }
          sums->shift[j] = near_mean(stored, rows, I::kWidth);
        }
        if constexpr (kNarrow) sums->shift[j] = rounded(sums->shift[j]);
      }
      for (int r = 0; r < rows; ++r) {
        const int64_t at = pixel[r] * g.k + column;
        V v = I::add(I::load(values + r * pitch + j * I::kWidth), bias);
        if (!kWhole && g.skip != nullptr) v = I::add(v, skip_at(pixel[r], column, n));
        if constexpr (E == Epilogue::kStore) v = act_forward<I, A>(g.act, v, slope);
        if constexpr (E == Epilogue::kMaskedSums) {
          const V zc = I::sub(read<I>(static_cast<const T*>(g.z) + at, n), mean);
          v = act_gradient<I, A>(g.z_act, v, I::fma(zc, scale, shift), slope);
          first = I::add(first, v);
          second = I::fma(v, zc, second);
        }
        write<I>(static_cast<T*>(g.y) + at, v, n);
        if constexpr (E == Epilogue::kStats) {
          // Of what the next pass will read.
          const V d = I::sub(kNarrow ? read<I>(static_cast<const T*>(g.y) + at, n) : v, sums->shift[j]);
          first = I::add(first, d);
          second = I::fma(d, d, second);
        }
      }
      sums->first[j] = first;
      sums->second[j] = second;
    }
    sums->started = true;
  }

  void start(PanelSums<I>* sums) const {
    for (int j = 0; j < 2; ++j) sums->shift[j] = sums->first[j] = sums->second[j] = I::zero();
    sums->started = false;
  }
  void finish(const PanelSpan& span, int64_t unit, const PanelSums<I>& sums) const {
    if constexpr (E == Epilogue::kStore) return;
    S* out = static_cast<S*>(g.partials) + unit * kConvSums * g.k_padded + span.column;
    for (int j = 0; j < g.vectors; ++j) {
      const int64_t left = span.count - j * I::kWidth, n = left < I::kWidth ? left : I::kWidth;
      if (n <= 0) break;
      write<I>(out + j * I::kWidth, sums.shift[j], n);
      write<I>(out + g.k_padded + j * I::kWidth, sums.first[j], n);
      write<I>(out + 2 * g.k_padded + j * I::kWidth, sums.second[j], n);
    }
  }
};

template <class I, class T, Epilogue E, class F>
inline void with_activation(const ConvArgs& g, Activation act, F f) {
  switch (act_class(act)) {
    case ActClass::kIdentity:
      return f(Finish<I, T, E, ActClass::kIdentity>(g));
    case ActClass::kRelu:
      return f(Finish<I, T, E, ActClass::kRelu>(g));
    case ActClass::kSlope:
      return f(Finish<I, T, E, ActClass::kSlope>(g));
    case ActClass::kSmooth:
      return f(Finish<I, T, E, ActClass::kSmooth>(g));
  }
}

template <class I, class T, class F>
inline void with_epilogue(const ConvArgs& g, F f) {
  switch (g.epilogue) {
    case Epilogue::kStore:
      return with_activation<I, T, Epilogue::kStore>(g, g.act, f);
    case Epilogue::kStats:
      return f(Finish<I, T, Epilogue::kStats, ActClass::kIdentity>(g));
    case Epilogue::kMaskedSums:
      return with_activation<I, T, Epilogue::kMaskedSums>(g, g.z_act, f);
  }
}
