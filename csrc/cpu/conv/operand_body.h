// The elements of a convolution's operand as it is packed: one vector of channels of one pixel. Included inside an
// unnamed namespace after the vector headers.
#pragma once

#include "simd/activation.h"
#include "simd/rows.h"

template <class I, class T>
FR_INLINE inline typename I::V read(const T* p, int64_t n) {
  return n == I::kWidth ? I::load(p) : load_n<I>(p, n);
}
template <class I, class T>
FR_INLINE inline void write(T* p, typename I::V v, int64_t n) {
  n == I::kWidth ? I::store(p, v) : store_n<I>(p, v, n);
}

template <class I>
FR_INLINE inline typename I::V masked(const uint8_t* row, int64_t column, int64_t n, typename I::V v) {
  return I::select(I::from_bits(load_bits<I::kWidth>(row, column, n)), v, I::zero());
}

// One operand, with the case it is compiled for.
template <class I, class T, OperandKind K, ActClass A>
struct Operand {
  using S = typename I::S;
  static constexpr bool kCopies = K == OperandKind::kPlain;
  const T *data, *z;
  const S *mean, *scale, *bias, *slope, *b, *c_term;
  const uint8_t* mask;
  int64_t channels, mask_bytes;
  Activation act;
  bool batch_stats;

  explicit Operand(const ConvOperand& o)
      : data(static_cast<const T*>(o.data)),
        z(static_cast<const T*>(o.z)),
        mean(static_cast<const S*>(o.mean)),
        scale(static_cast<const S*>(o.scale)),
        bias(static_cast<const S*>(o.bias)),
        slope(static_cast<const S*>(o.slope)),
        b(static_cast<const S*>(o.b)),
        c_term(static_cast<const S*>(o.c_term)),
        mask(o.mask),
        channels(o.c),
        mask_bytes((o.c + 7) / 8),
        act(o.act),
        batch_stats(o.batch_stats) {}

  // Brings the line of a pixel's channels from `column` on: all of two vectors of bfloat16, half of them of floats.
  FR_INLINE void prefetch(int64_t pixel, int64_t column) const {
    __builtin_prefetch(data + pixel * channels + column);
    if constexpr (K == OperandKind::kGradient) {
      if (z != nullptr) __builtin_prefetch(z + pixel * channels + column);
    }
  }

  // What one vector of channels has of its own.
  struct Terms {
    typename I::V mean, scale, bias, slope, b, c_term;
  };
  FR_INLINE Terms terms(int64_t column) const {
    Terms t;
    if constexpr (K != OperandKind::kPlain) t.mean = I::load(mean + column), t.scale = I::load(scale + column);
    if constexpr (K == OperandKind::kNorm) t.bias = I::load(bias + column), t.slope = I::load(slope + column);
    if constexpr (K == OperandKind::kGradient) t.b = I::load(b + column), t.c_term = I::load(c_term + column);
    return t;
  }

  // Channels [column, column + n) of pixel number `pixel` of the tensor, n <= width; lanes beyond n are anything.
  FR_INLINE typename I::V at(const Terms& t, int64_t pixel, int64_t column, int64_t n) const {
    const int64_t i = pixel * channels + column;
    auto v = read<I>(data + i, n);
    if constexpr (K == OperandKind::kNorm) {
      return act_forward<I, A>(act, I::fma(I::sub(v, t.mean), t.scale, t.bias), t.slope);
    } else {
      if (mask != nullptr) v = masked<I>(mask + pixel * mask_bytes, column, n, v);
      if constexpr (K == OperandKind::kGradient) {
        if (!batch_stats) return I::mul(v, t.scale);
        return chain<I>(true, v, t.scale, I::sub(read<I>(z + i, n), t.mean), t.b, t.c_term);
      }
      return v;
    }
  }
  FR_INLINE typename I::V at(int64_t pixel, int64_t column, int64_t n) const {
    return at(terms(column), pixel, column, n);
  }
};

// As Operand::at. Channels beyond the last are zero.
template <class I, class O>
FR_INLINE inline typename I::V element(const O& operand, int64_t pixel, int64_t column, int64_t n) {
  const auto v = operand.at(pixel, column, n);
  return n == I::kWidth ? v : I::select(I::from_bits((1u << n) - 1), v, I::zero());
}

// Calls f with the Operand type of this case.
template <class I, class T, class F>
inline void with_operand(const ConvOperand& o, F f) {
  switch (o.kind) {
    case OperandKind::kPlain:
      return f(Operand<I, T, OperandKind::kPlain, ActClass::kIdentity>(o));
    case OperandKind::kGradient:
      return f(Operand<I, T, OperandKind::kGradient, ActClass::kIdentity>(o));
    case OperandKind::kNorm:
      switch (act_class(o.act)) {
        case ActClass::kIdentity:
          return f(Operand<I, T, OperandKind::kNorm, ActClass::kIdentity>(o));
        case ActClass::kRelu:
          return f(Operand<I, T, OperandKind::kNorm, ActClass::kRelu>(o));
        case ActClass::kSlope:
          return f(Operand<I, T, OperandKind::kNorm, ActClass::kSlope>(o));
        case ActClass::kSmooth:
          return f(Operand<I, T, OperandKind::kNorm, ActClass::kSmooth>(o));
      }
  }
}
