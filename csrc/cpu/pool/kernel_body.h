// The stem kernels, once for every instruction set, dtype and layout.
//
//   forward          y = max over the 3x3 window of act((x - mean) * scale + bias), and which tap won
//   backward_reduce  g = act'(pre) * (sum of dy of the windows a pixel won); sums of g, g * (x - mean)
//   backward_apply   dx = g * scale + (x - mean) * b + c
//
// Window (oh, ow) covers rows 2*oh-1 .. 2*oh+1 and columns alike; tap = 3*kh + kw.
// A pixel lies in up to two windows along each axis. The normalised tensor is
// recomputed, never stored: 6 new taps a window cost less than the pass they save.
// NHWC runs over the channels of a pixel in vectors, through windows forward and for the sums, whose only terms are the
// winners', and through squares of four pixels for dx; NCHW: plane_body.h.
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

// A row of windows.
template <class I, class T>
class WindowRow {
 public:
  const T* line[3];
  float row[3];  // three times the row of a tap

  WindowRow(const Stem<I, T>& s, int64_t oh) : step_(s.step), last_(s.a.w - 1) {
    for (int64_t kh = 0; kh < 3; ++kh) {
      const int64_t ih = clamp(kStride * oh - 1 + kh, s.a.h - 1);
      line[kh] = s.x + ih * s.a.w * step_;
      row[kh] = static_cast<float>(3 * (ih - kStride * oh + 1));
    }
  }
  Window<T> at(int64_t ow) const {
    Window<T> w;
    for (int64_t kw = 0; kw < 3; ++kw) {
      const int64_t begin = kStride * ow - 1, iw = clamp(begin + kw, last_), at = iw * step_;
      const float column = static_cast<float>(iw - begin);
      for (int64_t kh = 0; kh < 3; ++kh) {
        w.x[3 * kh + kw] = line[kh] + at;
        w.index[3 * kh + kw] = row[kh] + column;
      }
    }
    return w;
  }

 private:
  int64_t step_, last_;
};

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

// A rising activation commutes with the maximum, so it is applied once. (Where relu makes ties of negative values, the
// winner gets no gradient anyway.)
template <ActClass A>
constexpr bool kRising = A == ActClass::kIdentity || A == ActClass::kRelu;

// The batch norm and activation of `n` channels from `col` on.
template <class I, class T, ActClass A>
struct Channels {
  using V = typename I::V;
  const Stem<I, T>& s;
  int64_t col, n;
  const Activation act = s.a.act;
  const V mean = s.parameter(s.a.mean, col), scale = s.parameter(s.a.scale, col), bias = s.parameter(s.a.bias, col);
  const V slope = A == ActClass::kSlope ? s.parameter(s.a.slope, col) : I::zero();

  FR_INLINE V centred(V x) const { return I::sub(x, mean); }
  FR_INLINE V pre(V xc) const { return I::fma(xc, scale, bias); }
  // What the maximum is taken of, and what is made of the maximum.
  FR_INLINE V value(const T* pixel) const {
    const auto v = pre(centred(s.read(pixel + col, n)));
    return kRising<A> ? v : act_forward<I, A>(act, v, slope);
  }
  FR_INLINE V finish(V best) const { return kRising<A> ? act_forward<I, A>(act, best, slope) : best; }
  FR_INLINE V gradient(V dy, V pre_activation) const { return act_gradient<I, A>(act, dy, pre_activation, slope); }
};

// One input column of a row of windows: the largest of its three values, three times the row of the first that is as
// large, and a sum that shows whether one may be a NaN.
template <class I>
struct Down {
  typename I::V most, row, sum;
};

// A row of windows. Neighbours share a column, so what it holds is kept for the next window: channels in parts.
template <class I, class T, ActClass A>
struct PooledRow {
  using S = typename I::S;
  using V = typename I::V;
  static constexpr int64_t kPart = 256;
  const Stem<I, T>& s;
  int64_t oh;
  const WindowRow<I, T> windows{s, oh};

  void run() const {
    for (int64_t first = 0; first < s.a.c; first += kPart) part(first, lower(first + kPart, s.a.c));
  }

 private:
  FR_INLINE Down<I> down(const Channels<I, T, A>& channels, int64_t iw) const {
    const int64_t at = iw * s.step;
    const auto a = channels.value(windows.line[0] + at), b = channels.value(windows.line[1] + at),
               c = channels.value(windows.line[2] + at);
    Down<I> d;
    d.most = I::max(I::max(a, b), c);
    d.row = I::select(I::eq(b, d.most), I::set1(windows.row[1]), I::set1(windows.row[2]));
    d.row = I::select(I::eq(a, d.most), I::set1(windows.row[0]), d.row);
    d.sum = I::add(I::add(a, b), c);
    return d;
  }

  void part(int64_t first, int64_t last) const {
    S kept[3][kPart + I::kWidth];
    for_columns<I::kWidth>(first, last,
                           [&](int64_t col, int64_t n) FR_INLINE { keep(down({s, col, n}, 0), kept, col - first); });
    for (int64_t ow = 0; ow < s.a.ow; ++ow) {
      for_columns<I::kWidth>(first, last,
                             [&](int64_t col, int64_t n) FR_INLINE { window_at(ow, {s, col, n}, kept, col - first); });
    }
  }
  FR_INLINE void keep(const Down<I>& d, S (&kept)[3][kPart + I::kWidth], int64_t at) const {
    I::store(kept[0] + at, d.most);
    I::store(kept[1] + at, d.row);
    I::store(kept[2] + at, d.sum);
  }

  FR_INLINE void window_at(int64_t ow, const Channels<I, T, A>& channels, S (&kept)[3][kPart + I::kWidth],
                           int64_t at) const {
    const int64_t begin = kStride * ow - 1, right_column = clamp(begin + 2, s.a.w - 1);
    const Down<I> left{I::load(kept[0] + at), I::load(kept[1] + at), I::load(kept[2] + at)};
    const Down<I> middle = down(channels, begin + 1), right = down(channels, right_column);
    keep(right, kept, at);
    auto best = I::max(I::max(left.most, middle.most), right.most), tap = I::zero();
    if (__builtin_expect(I::bits(I::is_nan(I::add(I::add(left.sum, middle.sum), right.sum))) != 0, 0)) {
      const Window<T> w = windows.at(ow);
      V v[9];
      for (int k = 0; k < 9; ++k) v[k] = channels.value(w.x[k]);
      scan_taps<I>(v, w.index, best, tap);
    } else {
      // The first in torch's order has the smallest number. A column outside the image repeats its neighbour.
      const auto none = I::set1(9);
      const auto number = [&](const Down<I>& d, int64_t iw) FR_INLINE {
        return I::select(I::eq(d.most, best), I::add(d.row, I::set1(static_cast<S>(iw - begin))), none);
      };
      tap =
          I::min(I::min(number(left, clamp(begin, s.a.w - 1)), number(middle, begin + 1)), number(right, right_column));
    }
    const int64_t out = (oh * s.a.ow + ow) * s.step + channels.col;
    s.write(s.y + out, channels.finish(best), channels.n, false);
    if (s.argmax_out != nullptr) s.write_u8(s.argmax_out + out, tap, channels.n);
  }
};

// The sums of the window at `at`: the only pixel that its gradient reaches is the winner.
template <class I, class T, ActClass A>
void sum_window(const Stem<I, T>& s, const Window<T>& w, int64_t at, typename I::S* sums, int64_t pitch) {
  const PoolArgs& a = s.a;
  const bool sum_slope = a.sum_slope;
  for_columns<I::kWidth>(0, a.c, [&](int64_t col, int64_t n) FR_INLINE {
    const Channels<I, T, A> channels{s, col, n};
    const auto tap = s.read_u8(s.argmax + at + col, n), dy = s.read(s.dy + at + col, n);
    auto x = s.read(w.x[0] + col, n);
#pragma GCC unroll 8
    for (int k = 1; k < 9; ++k) x = I::select(I::eq(tap, I::set1(w.index[k])), s.read(w.x[k] + col, n), x);
    const auto xc = channels.centred(x), pre = channels.pre(xc), g = channels.gradient(dy, pre);
    const auto bump = [&](int row, typename I::V v) FR_INLINE {
      typename I::S* p = sums + row * pitch + col;
      I::store(p, I::add(I::load(p), v));
    };
    bump(kSumG, g);
    bump(kSumGX, I::mul(g, xc));
    if constexpr (A == ActClass::kSlope) {
      if (sum_slope) bump(kSumSlope, I::select(I::gt(pre, I::zero()), I::zero(), I::mul(dy, pre)));
    }
  });
}

// dx of rows 2i and 2i + 1, columns 2j and 2j + 1: the windows that hold them are (i, j), its right neighbour, and the
// two below.
template <class I, class T, ActClass A>
void gradient_quad(const Stem<I, T>& s, int64_t i, int64_t j) {
  using V = typename I::V;
  const PoolArgs& a = s.a;
  const int64_t rows = lower(a.h - kStride * i, 2), cols = lower(a.w - kStride * j, 2);
  const bool right = j + 1 < a.ow, below = i + 1 < a.oh;
  const int64_t window = (i * a.ow + j) * s.step, across = right ? s.step : 0, down = below ? a.ow * s.step : 0;
  const int64_t pixel = kStride * (i * a.w + j) * s.step, line = a.w * s.step;
  const bool stream = a.stream, batch = a.batch_stats;
  for_columns<I::kWidth>(0, a.c, [&](int64_t col, int64_t n) FR_INLINE {
    const Channels<I, T, A> channels{s, col, n};
    const auto b = s.parameter(a.b, col), c = s.parameter(a.c_term, col);
    V tap[2][2], dy[2][2];
#pragma GCC unroll 2
    for (int y = 0; y < 2; ++y) {
#pragma GCC unroll 2
      for (int x = 0; x < 2; ++x) {
        const int64_t at = window + y * down + x * across + col;
        const bool there = (x == 0 || right) && (y == 0 || below);
        tap[y][x] = s.read_u8(s.argmax + at, n);
        dy[y][x] = there ? s.read(s.dy + at, n) : I::zero();
      }
    }
    const auto won = [&](int y, int x, int kh, int kw) FR_INLINE {
      return I::select(I::eq(tap[y][x], I::set1(static_cast<typename I::S>(3 * kh + kw))), dy[y][x], I::zero());
    };
#pragma GCC unroll 2
    for (int y = 0; y < 2; ++y) {
#pragma GCC unroll 2
      for (int x = 0; x < 2; ++x) {
        if (y >= rows || x >= cols) continue;
        auto sum = I::add(I::zero(), won(0, 0, y + 1, x + 1));  // no -0 of a single term
        if (x == 1) sum = I::add(sum, won(0, 1, y + 1, 0));
        if (y == 1) sum = I::add(sum, won(1, 0, 0, x + 1));
        if (x == 1 && y == 1) sum = I::add(sum, won(1, 1, 0, 0));
        const int64_t at = pixel + y * line + x * s.step + col;
        const auto xc = channels.centred(s.read(s.x + at, n));
        const auto g = channels.gradient(sum, channels.pre(xc));
        s.write(s.dx + at, chain<I>(batch, g, channels.scale, xc, b, c), n, stream);
      }
    }
  });
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

// Of a unit: NHWC goes through windows, and the two rows of pixels that stand for each; NCHW through rows of pixels.
inline int64_t backward_rows(const PoolArgs& a) { return a.layout == Layout::kNHWC ? a.oh : a.h; }

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
          PooledRow<I, T, A>{s, oh}.run();
        }
      }
    });
  });
}

template <class I, class T>
void backward_reduce(const PoolArgs& a, int64_t begin, int64_t end) {
  using S = typename I::S;
  with_pool_act(a.act, [&]<ActClass A>() {
    for_pool_chunks(a, begin, end, backward_rows(a), [&](int64_t chunk, int64_t unit, int64_t row, int64_t last) {
      const Stem<I, T> s(a, unit);
      if (a.layout == Layout::kNHWC) {
        S* sums = static_cast<S*>(a.partials) + chunk * kSums * a.channels_padded;
        for (int64_t i = 0; i < kSums * a.channels_padded; ++i) sums[i] = 0;
        for (int64_t oh = row; oh < last; ++oh) {
          const WindowRow<I, T> windows(s, oh);
          for (int64_t ow = 0; ow < a.ow; ++ow) {
            sum_window<I, T, A>(s, windows.at(ow), (oh * a.ow + ow) * s.step, sums, a.channels_padded);
          }
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
    for_pool_chunks(a, begin, end, backward_rows(a), [&](int64_t, int64_t unit, int64_t row, int64_t last) {
      const Stem<I, T> s(a, unit);
      for (int64_t i = row; i < last; ++i) {
        if (a.layout == Layout::kNHWC) {
          for (int64_t j = 0; j < a.ow; ++j) gradient_quad<I, T, A>(s, i, j);
        } else {
          gradient_plane_row<I, T, A, true>(s, i, nullptr);
        }
      }
    });
  });
  if (a.stream) I::fence();
}
