// The stem kernels, once for every instruction set, dtype and layout.
//
//   forward          y = max over the 3x3 window of act((x - mean) * scale + bias), and which tap won
//   backward_reduce  g = act'(pre) * (sum of dy of the windows this pixel won); sums of g, g * (x - mean)
//   backward_apply   dx = g * scale + (x - mean) * b + c
//
// Window (oh, ow) covers rows 2*oh-1 .. 2*oh+1 and columns alike; tap = 3*kh + kw.
// A pixel lies in up to two windows along each axis. The normalised tensor is
// recomputed, never stored: 9 taps a window cost less than the pass they save.
// NHWC runs over the channels of a pixel in vectors; NCHW: plane_body.h.
// Accumulation and determinism as in batch_norm/kernel_body.h.
//
// Included inside an unnamed namespace after the vector headers.
#pragma once

#include "simd/activation.h"
#include "simd/rows.h"
#include "simd/vec_scalar.h"

constexpr int64_t kStride = 2;

// One image (NHWC, step = c) or plane (NCHW, step = 1) of each tensor.
template <class I, class T>
struct Stem {
  using S = typename I::S;
  using V = typename I::V;
  const PoolArgs& a;
  int64_t step;   // elements from a pixel to the next
  int64_t param;  // first channel
  const T *x, *dy;
  T *y, *dx;
  const uint8_t* argmax;
  uint8_t* argmax_out;

  Stem(const PoolArgs& args, int64_t unit) : a(args) {
    const bool nhwc = a.layout == Layout::kNHWC;
    step = nhwc ? a.c : 1;
    param = nhwc ? 0 : unit % a.c;
    const int64_t in = unit * a.h * a.w * step, out = unit * a.oh * a.ow * step;
    x = static_cast<const T*>(a.x) + in;
    dy = static_cast<const T*>(a.dy) + (a.dy == nullptr ? 0 : out);
    y = static_cast<T*>(a.y) + (a.y == nullptr ? 0 : out);
    dx = static_cast<T*>(a.dx) + (a.dx == nullptr ? 0 : in);
    argmax = a.argmax == nullptr ? nullptr : a.argmax + out;
    argmax_out = a.argmax_out == nullptr ? nullptr : a.argmax_out + out;
  }

  FR_INLINE V parameter(const void* array, int64_t col) const {
    const S* p = static_cast<const S*>(array) + param + col;
    return I::load(p);
  }
  // NCHW: the one channel of this plane, in every lane.
  V channel(const void* array) const { return I::set1(static_cast<const S*>(array)[param]); }
  FR_INLINE static V read(const T* p, int64_t n) { return n == I::kWidth ? I::load(p) : load_n<I>(p, n); }
  FR_INLINE static V read_u8(const uint8_t* p, int64_t n) {
    if (n == I::kWidth) return I::load_u8(p);
    uint8_t lane[I::kWidth] = {};
    for (int64_t i = 0; i < n; ++i) lane[i] = p[i];
    return I::load_u8(lane);
  }
  FR_INLINE static void write(T* p, V v, int64_t n, bool stream) {
    if (n != I::kWidth) {
      store_n<I>(p, v, n);
    } else if (stream) {
      I::stream(p, v);
    } else {
      I::store(p, v);
    }
  }
  FR_INLINE static void write_u8(uint8_t* p, V v, int64_t n) {
    if (n == I::kWidth) return I::store_u8(p, v);
    uint8_t lane[I::kWidth];
    I::store_u8(lane, v);
    for (int64_t i = 0; i < n; ++i) p[i] = lane[i];
  }
};

inline int64_t lower(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t clamp(int64_t value, int64_t last) { return value < 0 ? 0 : value > last ? last : value; }

// The taps of one window, row by row. At the border a tap outside the image
// repeats one inside, index and all: that changes neither the maximum nor which
// pixel won.
template <class T>
struct Window {
  const T* x[9];
  float index[9];
};

template <class I, class T>
inline Window<T> window(const Stem<I, T>& s, int64_t oh, int64_t ow) {
  const PoolArgs& a = s.a;
  Window<T> w;
  for (int64_t kh = 0; kh < 3; ++kh) {
    const int64_t ih = clamp(kStride * oh - 1 + kh, a.h - 1);
    for (int64_t kw = 0; kw < 3; ++kw) {
      const int64_t iw = clamp(kStride * ow - 1 + kw, a.w - 1), tap = 3 * kh + kw;
      w.x[tap] = s.x + (ih * a.w + iw) * s.step;
      w.index[tap] = static_cast<float>(3 * (ih - kStride * oh + 1) + (iw - kStride * ow + 1));
    }
  }
  return w;
}

// Where a NaN may be among the taps, in torch's order: the last NaN, else the first maximum.
template <class I>
inline void scan_taps(const typename I::V (&v)[9], const float (&index)[9], typename I::V& best, typename I::V& tap) {
  best = v[0];
  tap = I::set1(index[0]);
  for (int k = 1; k < 9; ++k) {
    const auto wins = I::or_(I::gt(v[k], best), I::is_nan(v[k]));
    best = I::select(wins, v[k], best);
    tap = I::select(wins, I::set1(index[k]), tap);
  }
}

template <class I, class T, ActClass A>
void pool_pixel(const Stem<I, T>& s, int64_t oh, int64_t ow, int64_t columns) {
  // A rising activation commutes with the maximum, so it is applied once. (Where
  // relu makes ties of negative values, the winner gets no gradient anyway.)
  constexpr bool kRising = A == ActClass::kIdentity || A == ActClass::kRelu;
  const PoolArgs& a = s.a;
  const Window<T> w = window(s, oh, ow);
  const int64_t out = (oh * a.ow + ow) * s.step;
  T* const y = s.y + out;
  uint8_t* const argmax = s.argmax_out == nullptr ? nullptr : s.argmax_out + out;
  const Activation act = a.act;
  const auto column = [&](int64_t col, int64_t n) FR_INLINE {
    const auto mean = s.parameter(a.mean, col), scale = s.parameter(a.scale, col), bias = s.parameter(a.bias, col);
    const auto slope = A == ActClass::kSlope ? s.parameter(a.slope, col) : I::zero();
    typename I::V v[9];
    for (int k = 0; k < 9; ++k) {
      const auto pre = I::fma(I::sub(s.read(w.x[k] + col, n), mean), scale, bias);
      v[k] = kRising ? pre : act_forward<I, A>(act, pre, slope);
    }
    auto best = v[0], tap = I::set1(w.index[8]);
    for (int k = 1; k < 9; ++k) best = I::max(best, v[k]);
    auto nan = I::is_nan(v[0]);
    for (int k = 1; k < 9; ++k) nan = I::or_(nan, I::is_nan(v[k]));
    if (I::bits(nan) != 0) {
      scan_taps<I>(v, w.index, best, tap);
    } else {
      for (int k = 7; k >= 0; --k) tap = I::select(I::eq(v[k], best), I::set1(w.index[k]), tap);
    }
    if (kRising) best = act_forward<I, A>(act, best, slope);
    s.write(y + col, best, n, false);
    if (argmax != nullptr) s.write_u8(argmax + col, tap, n);
  };
  for_columns<I::kWidth>(0, columns, column);
}

// The windows that hold one input pixel: up to two along each axis.
template <class T>
struct Holders {
  const T* dy[4];
  const uint8_t* argmax[4];
  float tap[4];
  int count;
};

template <class I, class T>
inline Holders<T> holders(const Stem<I, T>& s, int64_t ih, int64_t iw) {
  const PoolArgs& a = s.a;
  Holders<T> w;
  w.count = 0;
  for (int64_t oh = ih / kStride; oh <= (ih + 1) / kStride && oh < a.oh; ++oh) {
    for (int64_t ow = iw / kStride; ow <= (iw + 1) / kStride && ow < a.ow; ++ow) {
      const int64_t at = (oh * a.ow + ow) * s.step;
      w.dy[w.count] = s.dy + at;
      w.argmax[w.count] = s.argmax + at;
      w.tap[w.count] = static_cast<float>(3 * (ih + 1 - kStride * oh) + (iw + 1 - kStride * ow));
      ++w.count;
    }
  }
  return w;
}

template <class I, class T, ActClass A, bool kWrite, int kHolders>
void gradient_pixel(const Stem<I, T>& s, const Holders<T>& w, int64_t at, int64_t columns, typename I::S* sums,
                    int64_t pitch) {
  const PoolArgs& a = s.a;
  const T* const x = s.x + at;
  T* const out = kWrite ? s.dx + at : nullptr;
  const bool stream = a.stream, sum_slope = a.sum_slope, batch = a.batch_stats;
  const Activation act = a.act;
  const auto column = [&](int64_t col, int64_t n) FR_INLINE {
    const auto mean = s.parameter(a.mean, col), scale = s.parameter(a.scale, col), bias = s.parameter(a.bias, col);
    const auto slope = A == ActClass::kSlope ? s.parameter(a.slope, col) : I::zero();
    auto dy = I::zero();
    for (int k = 0; k < kHolders; ++k) {
      const auto won = I::eq(s.read_u8(w.argmax[k] + col, n), I::set1(w.tap[k]));
      dy = I::add(dy, I::select(won, s.read(w.dy[k] + col, n), I::zero()));
    }
    const auto xc = I::sub(s.read(x + col, n), mean);
    const auto pre = I::fma(xc, scale, bias);
    const auto g = act_gradient<I, A>(act, dy, pre, slope);
    if constexpr (kWrite) {
      const auto b = s.parameter(a.b, col), c = s.parameter(a.c_term, col);
      s.write(out + col, chain<I>(batch, g, scale, xc, b, c), n, stream);
    } else {
      const auto bump = [&](int row, typename I::V v) FR_INLINE {
        typename I::S* p = sums + row * pitch + col;
        I::store(p, I::add(I::load(p), v));
      };
      bump(kSumG, g);
      bump(kSumGX, I::mul(g, xc));
      if constexpr (A == ActClass::kSlope) {
        if (sum_slope) bump(kSumSlope, I::select(I::gt(pre, I::zero()), I::zero(), I::mul(dy, pre)));
      }
    }
  };
  for_columns<I::kWidth>(0, columns, column);
}

template <class I, class T, ActClass A, bool kWrite>
void gradient_row(const Stem<I, T>& s, int64_t ih, int64_t columns, typename I::S* sums, int64_t pitch) {
  for (int64_t iw = 0; iw < s.a.w; ++iw) {
    const Holders<T> w = holders(s, ih, iw);
    const int64_t at = (ih * s.a.w + iw) * s.step;
    switch (w.count) {
      case 1:
        gradient_pixel<I, T, A, kWrite, 1>(s, w, at, columns, sums, pitch);
        break;
      case 2:
        gradient_pixel<I, T, A, kWrite, 2>(s, w, at, columns, sums, pitch);
        break;
      default:
        gradient_pixel<I, T, A, kWrite, 4>(s, w, at, columns, sums, pitch);
        break;
    }
  }
}

#include "pool/plane_body.h"

template <class F>
inline void with_pool_act(Activation act, F f) {
  switch (act_class(act)) {
    case ActClass::kIdentity:
      return f.template operator()<ActClass::kIdentity>();
    case ActClass::kRelu:
      return f.template operator()<ActClass::kRelu>();
    case ActClass::kSlope:
      return f.template operator()<ActClass::kSlope>();
    case ActClass::kSmooth:
      return f.template operator()<ActClass::kSmooth>();
  }
}

// f(chunk, unit, first row, last row) for every chunk of `height` rows a unit.
template <class F>
inline void for_pool_chunks(const PoolArgs& a, int64_t begin, int64_t end, int64_t height, F f) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t row = chunk % a.chunks_per_image * a.chunk_rows;
    f(chunk, chunk / a.chunks_per_image, row, lower(row + a.chunk_rows, height));
  }
}

template <class I, class T>
void forward(const PoolArgs& a, int64_t begin, int64_t end) {
  with_pool_act(a.act, [&]<ActClass A>() {
    for_pool_chunks(a, begin, end, a.oh, [&](int64_t, int64_t unit, int64_t row, int64_t last) {
      const Stem<I, T> s(a, unit);
      for (int64_t oh = row; oh < last; ++oh) {
        if (a.layout == Layout::kNCHW) {
          pool_plane_row<I, T, A>(s, oh);
        } else {
          for (int64_t ow = 0; ow < a.ow; ++ow) pool_pixel<I, T, A>(s, oh, ow, a.c);
        }
      }
    });
  });
}

template <class I, class T>
void backward_reduce(const PoolArgs& a, int64_t begin, int64_t end) {
  using S = typename I::S;
  with_pool_act(a.act, [&]<ActClass A>() {
    for_pool_chunks(a, begin, end, a.h, [&](int64_t chunk, int64_t unit, int64_t row, int64_t last) {
      const Stem<I, T> s(a, unit);
      if (a.layout == Layout::kNHWC) {
        S* sums = static_cast<S*>(a.partials) + chunk * kSums * a.channels_padded;
        for (int64_t i = 0; i < kSums * a.channels_padded; ++i) sums[i] = 0;
        for (int64_t ih = row; ih < last; ++ih) {
          gradient_row<I, T, A, false>(s, ih, a.c, sums, a.channels_padded);
        }
      } else {
        double* sums = static_cast<double*>(a.partials) + chunk * kSums;
        for (int i = 0; i < kSums; ++i) sums[i] = 0;
        for (int64_t ih = row; ih < last; ++ih) gradient_plane_row<I, T, A, false>(s, ih, sums);
      }
    });
  });
}

template <class I, class T>
void backward_apply(const PoolArgs& a, int64_t begin, int64_t end) {
  with_pool_act(a.act, [&]<ActClass A>() {
    for_pool_chunks(a, begin, end, a.h, [&](int64_t, int64_t unit, int64_t row, int64_t last) {
      const Stem<I, T> s(a, unit);
      for (int64_t ih = row; ih < last; ++ih) {
        if (a.layout == Layout::kNHWC) {
          gradient_row<I, T, A, true>(s, ih, a.c, nullptr, 0);
        } else {
          gradient_plane_row<I, T, A, true>(s, ih, nullptr);
        }
      }
    });
  });
  if (a.stream) I::fence();
}
