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

// What is added to a position before its activation: nothing, elements of skip, or those that skip_mask has.
enum class Skip : uint8_t { kNone, kWhole, kMasked };

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
  // The mean of the tile's rows, at(0) to at(rows - 1), without the largest and the smallest: no single value may move
  // the shift far.
  template <class F>
  static FR_INLINE V near_mean(int rows, F at) {
    V sum = at(0), least = sum, most = sum;
    for (int r = 1; r < rows; ++r) {
      const V v = at(r);
      sum = I::add(sum, v);
      least = I::min(least, v);
      most = I::max(most, v);
    }
    if (rows < 3) return I::mul(sum, I::set1(S(1) / static_cast<S>(rows)));
    return I::mul(I::sub(I::sub(sum, most), least), I::set1(S(1) / static_cast<S>(rows - 2)));
  }
  V skip_at(int64_t pixel, int64_t column, int64_t n) const {
    const V v = read<I>(static_cast<const T*>(g.skip) + pixel * g.k + column, n);
    return g.skip_mask == nullptr ? v : without_masked(v, pixel, column, n);
  }
  FR_INLINE V without_masked(V v, int64_t pixel, int64_t column, int64_t n) const {
    const unsigned bits = mask_bits<I::kWidth>(g.skip_mask + pixel * mask_bytes, column, n);
    return I::select(I::from_bits(bits), v, I::zero());
  }
  // Without a bias what changes nothing, not even -0.
  V bias_at(int64_t column) const { return g.bias == nullptr ? I::set1(S(-0.0)) : parameter(g.bias, column); }
  static V parameter(const void* array, int64_t column) { return I::load(static_cast<const S*>(array) + column); }

  // Brings what the epilogue reads beside the tile, and the lines that it writes, towards the core while the tile is
  // computed: a store that waits for its line holds up all behind it.
  FR_INLINE void prefetch(const PanelSpan& span, const int64_t* pixel, int64_t rows) const {
    const int64_t pitch = g.k * static_cast<int64_t>(sizeof(T)), bytes = span.count * static_cast<int64_t>(sizeof(T));
    const int64_t from = span.column * static_cast<int64_t>(sizeof(T));
    if (!g.stream) lines<1>(static_cast<const char*>(g.y) + from, pitch, bytes, pixel, rows);
    if constexpr (E == Epilogue::kMaskedSums) {
      lines<0>(static_cast<const char*>(g.z) + from, pitch, bytes, pixel, rows);
    }
    if (g.skip != nullptr) lines<0>(static_cast<const char*>(g.skip) + from, pitch, bytes, pixel, rows);
  }
  template <int kWrite>
  static FR_INLINE void lines(const char* at, int64_t pitch, int64_t bytes, const int64_t* pixel, int64_t rows) {
    constexpr int64_t kLine = 64;
    if (bytes <= kLine) {
      for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(at + pixel[r] * pitch, kWrite);
    } else {  // a panel is two lines at most
      for (int64_t r = 0; r < rows; ++r) {
        __builtin_prefetch(at + pixel[r] * pitch, kWrite);
        __builtin_prefetch(at + pixel[r] * pitch + kLine, kWrite);
      }
    }
  }

  // Position r of the tile is pixel[r] of y.
  FR_INLINE void tile(const PanelSpan& span, const int64_t* pixel, int rows, const S* values,
                      PanelSums<I>* sums) const {
    if (span.count == g.vectors * I::kWidth) {
      if (g.skip == nullptr) {
        return g.vectors == 2 ? tile_whole<2, Skip::kNone>(span.column, pixel, rows, values, sums)
                              : tile_whole<1, Skip::kNone>(span.column, pixel, rows, values, sums);
      }
      if constexpr (E == Epilogue::kStore) {
        if (g.vectors == 2 && takes_mask()) {
          if (g.skip_mask == nullptr) return tile_whole<2, Skip::kWhole>(span.column, pixel, rows, values, sums);
          if constexpr (kMasks) return tile_whole<2, Skip::kMasked>(span.column, pixel, rows, values, sums);
        }
      }
    }
    tile_rows(span, pixel, rows, values, sums);
  }

  // Whether a whole tile can be finished where it was summed, in registers. The first tile of a panel is not: all of it
  // is looked at for its shift.
  bool takes_registers(const PanelSpan& span, const PanelSums<I>& sums) const {
    if (g.vectors != 2 || span.count != 2 * I::kWidth || !takes_mask()) return false;
    return E == Epilogue::kStore || (g.skip == nullptr && (E != Epilogue::kStats || sums.started));
  }
  // Masks are a gradient's: there is no activation with them.
  static constexpr bool kMasks = E == Epilogue::kStore && A == ActClass::kIdentity;
  bool takes_mask() const { return kMasks || g.skip_mask == nullptr; }
  // kFlushed: sums of products are never denormal.
  template <bool kFlushed, int kRows>
  FR_INLINE void registers(int64_t column, const int64_t* pixel, V (&value)[kRows][2], PanelSums<I>* sums) const {
    if (g.bias != nullptr) {
      const V bias[2] = {parameter(g.bias, column), parameter(g.bias, column + I::kWidth)};
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        value[r][0] = I::add(value[r][0], bias[0]);
        value[r][1] = I::add(value[r][1], bias[1]);
      }
    }
    const auto at = [&](int r, int j) FR_INLINE { return value[r][j]; };
    if constexpr (E == Epilogue::kStore) {
      if constexpr (kMasks) {
        if (g.skip != nullptr && g.skip_mask != nullptr) {
          return whole<2, Skip::kMasked, false, kRows>(column, pixel, kRows, at, sums);
        }
      }
      if (g.skip != nullptr) return whole<2, Skip::kWhole, false, kRows>(column, pixel, kRows, at, sums);
    }
    constexpr bool kLinear = A == ActClass::kIdentity || A == ActClass::kRelu;
    if constexpr (kLinear && requires { I::store2_normal(static_cast<T*>(nullptr), value[0][0], value[0][1]); }) {
      if ((kFlushed && g.bias == nullptr) || all_normal(value)) {
        return whole<2, Skip::kNone, true, kRows>(column, pixel, kRows, at, sums);
      }
    }
    whole<2, Skip::kNone, false, kRows>(column, pixel, kRows, at, sums);
  }
  // As `registers`, for sums in memory, where what is added to them is added first.
  template <bool kFlushed>
  FR_INLINE void stored(int64_t column, const int64_t* pixel, int rows, S* values, PanelSums<I>* sums) const {
    bool normal = kFlushed;
    if (g.bias != nullptr || g.skip != nullptr) {
      V bias[2] = {bias_at(column), bias_at(column + I::kWidth)}, least = I::set1(S(1));
      for (int r = 0; r < rows; ++r) {
        V v[2];
        for (int j = 0; j < 2; ++j) {
          v[j] = I::add(I::load(values + (r * 2 + j) * I::kWidth), bias[j]);
          if (g.skip != nullptr) v[j] = I::add(v[j], skip_at(pixel[r], column + j * I::kWidth, I::kWidth));
          I::store(values + (r * 2 + j) * I::kWidth, v[j]);
        }
        least = I::smaller(least, I::smaller(v[0], v[1]));
      }
      normal = I::normal(least);
    }
    const auto at = [&](int r, int j) FR_INLINE { return I::load(values + (r * 2 + j) * I::kWidth); };
    constexpr bool kLinear = A == ActClass::kIdentity || A == ActClass::kRelu;
    if (kLinear && normal) return whole<2, Skip::kNone, true, 0>(column, pixel, rows, at, sums);
    whole<2, Skip::kNone, false, 0>(column, pixel, rows, at, sums);
  }
  template <int kRows>
  static FR_INLINE bool all_normal(const V (&value)[kRows][2]) {
    // A tree: one chain would take as long as a quarter of the products of 64 channels.
    V least[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) least[r] = I::smaller(value[r][0], value[r][1]);
#pragma GCC unroll 4
    for (int n = kRows; n > 1; n = (n + 1) / 2) {
#pragma GCC unroll 8
      for (int r = 0; r < n / 2; ++r) least[r] = I::smaller(least[r], least[n - 1 - r]);
    }
    return __builtin_expect(I::normal(least[0]), 1);
  }

  // A tile of whole vectors in memory.
  template <int kVectors, Skip kSkip>
  FR_INLINE void tile_whole(int64_t column, const int64_t* pixel, int rows, const S* values, PanelSums<I>* sums) const {
    V bias[kVectors];
    for (int j = 0; j < kVectors; ++j) bias[j] = bias_at(column + j * I::kWidth);
    const auto sum = [&](int r, int j) FR_INLINE { return I::load(values + (r * kVectors + j) * I::kWidth); };
    const auto at = [&](int r, int j) FR_INLINE { return I::add(sum(r, j), bias[j]); };
    if constexpr (E == Epilogue::kStats) {
      for (int j = 0; j < kVectors && !sums->started; ++j) {
        sums->shift[j] = I::add(near_mean(rows, [&](int r) FR_INLINE { return sum(r, j); }), bias[j]);
        if constexpr (kNarrow) sums->shift[j] = rounded(sums->shift[j]);
      }
    }
    whole<kVectors, kSkip, false, 0>(column, pixel, rows, at, sums);
  }

  // Positions of whole vectors, value(r, j) with bias: nothing is decided for each. kNormal: none is so small that
  // storing it takes care. kRows: how many, or 0 if only `rows` knows. Sums are two chains for each vector, of even and
  // of odd positions: one would take as long as the products of few channels.
  template <int kVectors, Skip kSkip, bool kNormal, int kRows, class F>
  FR_INLINE void whole(int64_t column, const int64_t* pixel, int rows, F value, PanelSums<I>* sums) const {
    constexpr int64_t kWidth = I::kWidth;
    constexpr bool kSums = E != Epilogue::kStore;
    const int64_t k = g.k;
    const Activation act = E == Epilogue::kStore ? g.act : g.z_act;
    const bool stream = g.stream;
    T* const y = static_cast<T*>(g.y) + column;
    const T* const skip = static_cast<const T*>(g.skip) + (kSkip == Skip::kNone ? 0 : column);
    const T* const z = static_cast<const T*>(g.z) + (E == Epilogue::kMaskedSums ? column : 0);
    V slope[kVectors], mean[kVectors], scale[kVectors], shift[kVectors];
    V even[2][kVectors], odd[2][kVectors];
    for (int j = 0; j < kVectors; ++j) {
      const int64_t at = column + j * kWidth;
      if constexpr (E == Epilogue::kStore) slope[j] = A == ActClass::kSlope ? parameter(g.act_slope, at) : I::zero();
      if constexpr (E == Epilogue::kMaskedSums) {
        mean[j] = parameter(g.z_mean, at), scale[j] = parameter(g.z_scale, at);
        shift[j] = parameter(g.z_bias, at), slope[j] = parameter(g.z_slope, at);
      }
      if constexpr (E == Epilogue::kStats) shift[j] = sums->shift[j];
      if constexpr (kSums) {
        even[0][j] = sums->first[j], even[1][j] = sums->second[j];
        odd[0][j] = odd[1][j] = I::zero();
      }
    }
    const auto position = [&](int r, V(&chain)[2][kVectors]) FR_INLINE {
      const int64_t at = pixel[r] * k;
      V v[kVectors], zc[kVectors];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        v[j] = value(r, j);
        if constexpr (kSkip == Skip::kWhole) v[j] = I::add(v[j], I::load(skip + at + j * kWidth));
        if constexpr (kSkip == Skip::kMasked) {
          v[j] = I::add(v[j], without_masked(I::load(skip + at + j * kWidth), pixel[r], column + j * kWidth, kWidth));
        }
        if constexpr (E == Epilogue::kStore) v[j] = act_forward<I, A>(act, v[j], slope[j]);
        if constexpr (E == Epilogue::kMaskedSums) {
          zc[j] = I::sub(I::load(z + at + j * kWidth), mean[j]);
          v[j] = act_gradient<I, A>(act, v[j], I::fma(zc[j], scale[j], shift[j]), slope[j]);
        }
      }
      // Statistics are of what the next pass will read.
      if constexpr (kNormal) {
        stream ? I::stream2_normal(y + at, v[0], v[1]) : I::store2_normal(y + at, v[0], v[1]);
        if constexpr (E == Epilogue::kStats && kNarrow) I::round2_normal(&v[0], &v[1]);
      } else {
        if constexpr (kVectors == 2 && requires { I::store2(y, v[0], v[1]); }) {
          I::store2(y + at, v[0], v[1]);
        } else {
#pragma GCC unroll 2
          for (int j = 0; j < kVectors; ++j) {
            if constexpr (kNarrow) {
              I::store(y + at + j * kWidth, v[j]);
            } else {
              stream ? I::stream(y + at + j * kWidth, v[j]) : I::store(y + at + j * kWidth, v[j]);
            }
          }
        }
        if constexpr (E == Epilogue::kStats && kNarrow) {
#pragma GCC unroll 2
          for (int j = 0; j < kVectors; ++j) v[j] = I::load(y + at + j * kWidth);
        }
      }
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        if constexpr (E == Epilogue::kMaskedSums) {
          chain[0][j] = I::add(chain[0][j], v[j]);
          chain[1][j] = I::fma(v[j], zc[j], chain[1][j]);
        }
        if constexpr (E == Epilogue::kStats) {
          const V d = I::sub(v[j], shift[j]);
          chain[0][j] = I::add(chain[0][j], d);
          chain[1][j] = I::fma(d, d, chain[1][j]);
        }
      }
    };
    if constexpr (kRows > 0) {
#pragma GCC unroll 8
      for (int r = 0; r + 1 < kRows; r += 2) position(r, even), position(r + 1, odd);
      if constexpr (kRows % 2 != 0) position(kRows - 1, even);
    } else {
      int r = 0;
      for (; r + 1 < rows; r += 2) position(r, even), position(r + 1, odd);
      if (r < rows) position(r, even);
    }
    if constexpr (kSums) {
      for (int j = 0; j < kVectors; ++j) {
        sums->first[j] = I::add(even[0][j], odd[0][j]);
        sums->second[j] = I::add(even[1][j], odd[1][j]);
      }
      sums->started = true;
    }
  }

  // Any tile.
  FR_INLINE void tile_rows(const PanelSpan& span, const int64_t* pixel, int rows, const S* values,
                           PanelSums<I>* sums) const {
    const int64_t pitch = g.vectors * I::kWidth;
    for (int j = 0; j < g.vectors; ++j) {
      const int64_t column = span.column + j * I::kWidth, left = span.count - j * I::kWidth;
      if (left <= 0) break;
      const int64_t n = left >= I::kWidth ? I::kWidth : left;
      const V bias = bias_at(column);
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
        if (!sums->started) {
          // Of what is stored, or equal values would not sum to exactly 0.
          sums->shift[j] = near_mean(rows, [&](int r) FR_INLINE {
            const V v = I::add(I::load(values + r * pitch + j * I::kWidth), bias);
            return g.skip == nullptr ? v : I::add(v, skip_at(pixel[r], column, n));
          });
          if constexpr (kNarrow) sums->shift[j] = rounded(sums->shift[j]);
        }
      }
      for (int r = 0; r < rows; ++r) {
        const int64_t at = pixel[r] * g.k + column;
        V v = I::add(I::load(values + r * pitch + j * I::kWidth), bias);
        if (g.skip != nullptr) v = I::add(v, skip_at(pixel[r], column, n));
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
