// The stem kernels, once for every instruction set, dtype and layout.
//
//   forward          y = max over the 3x3 window of act((x - mean) * scale + bias), and which tap won
//   backward_reduce  g = act'(pre) * (sum of dy of the windows this pixel won); sums of g, g * (x - mean)
//   backward_apply   dx = g * scale + (x - mean) * b + c
//
// Window (oh, ow) covers rows 2*oh-1 .. 2*oh+1 and columns alike; tap = 3*kh + kw.
// A pixel lies in up to two windows along each axis. The normalised tensor is
// recomputed, never stored: 9 taps a window cost less than the pass they save.
// NHWC runs over channels in vectors; NCHW runs a pixel at a time.
// Accumulation and determinism as in batch_norm/kernel_body.h.
//
// Included inside an unnamed namespace after the vector headers.

constexpr int64_t kStride = 2;

// One image (NHWC, step = c) or plane (NCHW, step = 1) of each tensor.
template <class I, class T>
struct Stem {
  using S = typename I::S;
  using V = typename I::V;
  const PoolArgs& a;
  int64_t step;        // elements from a pixel to the next
  int64_t param;       // first channel
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

  V parameter(const void* array, int64_t col) const {
    const S* p = static_cast<const S*>(array) + param + col;
    return a.layout == Layout::kNHWC ? I::load(p) : I::set1(*p);
  }
  V read(const T* p, int64_t n) const { return n == I::kWidth ? I::load(p) : load_n<I>(p, n); }
  V read_u8(const uint8_t* p, int64_t n) const {
    if (n == I::kWidth) return I::load_u8(p);
    uint8_t lane[I::kWidth] = {};
    for (int64_t i = 0; i < n; ++i) lane[i] = p[i];
    return I::load_u8(lane);
  }
};

inline int64_t lower(int64_t a, int64_t b) { return a < b ? a : b; }

template <class I, class T, ActClass A>
void pool_row(const Stem<I, T>& s, int64_t oh, int64_t columns) {
  const PoolArgs& a = s.a;
  for (int64_t col = 0; col < columns; col += I::kWidth) {
    const int64_t n = lower(I::kWidth, columns - col);
    const auto mean = s.parameter(a.mean, col), scale = s.parameter(a.scale, col), bias = s.parameter(a.bias, col);
    const auto slope = A == ActClass::kSlope ? s.parameter(a.slope, col) : I::zero();
    for (int64_t ow = 0; ow < a.ow; ++ow) {
      bool first = true;
      auto best = I::zero(), tap = I::zero();
      for (int64_t kh = 0; kh < 3; ++kh) {
        const int64_t ih = kStride * oh - 1 + kh;
        if (ih < 0 || ih >= a.h) continue;
        for (int64_t kw = 0; kw < 3; ++kw) {
          const int64_t iw = kStride * ow - 1 + kw;
          if (iw < 0 || iw >= a.w) continue;
          const auto pre = I::fma(I::sub(s.read(s.x + (ih * a.w + iw) * s.step + col, n), mean), scale, bias);
          const auto v = act_forward<I, A>(a.act, pre, slope);
          const auto here = I::set1(static_cast<typename I::S>(3 * kh + kw));
          if (first) {
            best = v;
            tap = here;
            first = false;
          } else {
            const auto wins = I::or_(I::gt(v, best), I::is_nan(v));
            best = I::select(wins, v, best);
            tap = I::select(wins, here, tap);
          }
        }
      }
      const int64_t at = (oh * a.ow + ow) * s.step + col;
      if (n == I::kWidth) {
        I::store(s.y + at, best);
        if (s.argmax_out != nullptr) I::store_u8(s.argmax_out + at, tap);
      } else {
        store_n<I>(s.y + at, best, n);
        if (s.argmax_out != nullptr) {
          uint8_t lane[I::kWidth];
          I::store_u8(lane, tap);
          for (int64_t i = 0; i < n; ++i) s.argmax_out[at + i] = lane[i];
        }
      }
    }
  }
}

// Sum of dy over the windows that pixel (ih, iw) won.
template <class I, class T>
inline typename I::V gather(const Stem<I, T>& s, int64_t ih, int64_t iw, int64_t col, int64_t n) {
  const PoolArgs& a = s.a;
  auto total = I::zero();
  for (int64_t oh = ih / kStride; oh <= (ih + 1) / kStride && oh < a.oh; ++oh) {
    const int64_t kh = ih + 1 - kStride * oh;
    for (int64_t ow = iw / kStride; ow <= (iw + 1) / kStride && ow < a.ow; ++ow) {
      const int64_t kw = iw + 1 - kStride * ow, at = (oh * a.ow + ow) * s.step + col;
      const auto here = I::set1(static_cast<typename I::S>(3 * kh + kw));
      const auto won = I::eq(s.read_u8(s.argmax + at, n), here);
      total = I::add(total, I::select(won, s.read(s.dy + at, n), I::zero()));
    }
  }
  return total;
}

template <class I, class T, ActClass A, bool kWrite>
void gradient_row(const Stem<I, T>& s, int64_t ih, int64_t columns, typename I::S* sums, int64_t pitch) {
  const PoolArgs& a = s.a;
  for (int64_t col = 0; col < columns; col += I::kWidth) {
    const int64_t n = lower(I::kWidth, columns - col);
    const auto mean = s.parameter(a.mean, col), scale = s.parameter(a.scale, col), bias = s.parameter(a.bias, col);
    const auto slope = A == ActClass::kSlope ? s.parameter(a.slope, col) : I::zero();
    const auto b = kWrite ? s.parameter(a.b, col) : I::zero(), c = kWrite ? s.parameter(a.c_term, col) : I::zero();
    auto sg = I::zero(), sx = I::zero(), sk = I::zero();
    for (int64_t iw = 0; iw < a.w; ++iw) {
      const int64_t at = (ih * a.w + iw) * s.step + col;
      const auto xc = I::sub(s.read(s.x + at, n), mean);
      const auto pre = I::fma(xc, scale, bias);
      const auto dy = gather(s, ih, iw, col, n);
      const auto g = act_gradient<I, A>(a.act, dy, pre, slope);
      if constexpr (kWrite) {
        const auto dx = I::fma(g, scale, I::fma(xc, b, c));
        if (n != I::kWidth) {
          store_n<I>(s.dx + at, dx, n);
        } else if (a.stream) {
          I::stream(s.dx + at, dx);
        } else {
          I::store(s.dx + at, dx);
        }
      } else {
        sg = I::add(sg, g);
        sx = I::fma(g, xc, sx);
        if constexpr (A == ActClass::kSlope) {
          if (a.sum_slope) sk = I::add(sk, I::select(I::gt(pre, I::zero()), I::zero(), I::mul(dy, pre)));
        }
      }
    }
    if constexpr (!kWrite) {
      I::store(sums + kSumG * pitch + col, I::add(I::load(sums + kSumG * pitch + col), sg));
      I::store(sums + kSumGX * pitch + col, I::add(I::load(sums + kSumGX * pitch + col), sx));
      if constexpr (A == ActClass::kSlope) {
        I::store(sums + kSumSlope * pitch + col, I::add(I::load(sums + kSumSlope * pitch + col), sk));
      }
    }
  }
}

template <class F>
inline void with_pool_act(Activation act, F f) {
  switch (act_class(act)) {
    case ActClass::kIdentity: return f.template operator()<ActClass::kIdentity>();
    case ActClass::kRelu: return f.template operator()<ActClass::kRelu>();
    case ActClass::kSlope: return f.template operator()<ActClass::kSlope>();
    case ActClass::kSmooth: return f.template operator()<ActClass::kSmooth>();
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

// NCHW goes pixel by pixel: the same code with one lane.
template <class I, class T, ActClass A>
void forward_as(const PoolArgs& a, int64_t begin, int64_t end, int64_t columns) {
  for_pool_chunks(a, begin, end, a.oh, [&](int64_t, int64_t unit, int64_t row, int64_t last) {
    const Stem<I, T> s(a, unit);
    for (int64_t oh = row; oh < last; ++oh) pool_row<I, T, A>(s, oh, columns);
  });
}

template <class I, class T>
void forward(const PoolArgs& a, int64_t begin, int64_t end) {
  with_pool_act(a.act, [&]<ActClass A>() {
    if (a.layout == Layout::kNHWC) return forward_as<I, T, A>(a, begin, end, a.c);
    forward_as<ScalarOps<typename I::S>, T, A>(a, begin, end, 1);
  });
}

template <class I, class T>
void backward_reduce(const PoolArgs& a, int64_t begin, int64_t end) {
  using S = typename I::S;
  using One = ScalarOps<S>;
  with_pool_act(a.act, [&]<ActClass A>() {
    for_pool_chunks(a, begin, end, a.h, [&](int64_t chunk, int64_t unit, int64_t row, int64_t last) {
      if (a.layout == Layout::kNHWC) {
        S* sums = static_cast<S*>(a.partials) + chunk * kSums * a.channels_padded;
        for (int64_t i = 0; i < kSums * a.channels_padded; ++i) sums[i] = 0;
        const Stem<I, T> s(a, unit);
        for (int64_t ih = row; ih < last; ++ih) {
          gradient_row<I, T, A, false>(s, ih, a.c, sums, a.channels_padded);
        }
      } else {
        double* out = static_cast<double*>(a.partials) + chunk * kSums;
        for (int i = 0; i < kSums; ++i) out[i] = 0;
        const Stem<One, T> s(a, unit);
        for (int64_t ih = row; ih < last; ++ih) {
          S sums[kSums] = {};
          gradient_row<One, T, A, false>(s, ih, 1, sums, 1);
          for (int i = 0; i < kSums; ++i) out[i] += static_cast<double>(sums[i]);
        }
      }
    });
  });
}

template <class I, class T>
void backward_apply(const PoolArgs& a, int64_t begin, int64_t end) {
  with_pool_act(a.act, [&]<ActClass A>() {
    for_pool_chunks(a, begin, end, a.h, [&](int64_t, int64_t unit, int64_t row, int64_t last) {
      if (a.layout == Layout::kNHWC) {
        const Stem<I, T> s(a, unit);
        for (int64_t ih = row; ih < last; ++ih) gradient_row<I, T, A, true>(s, ih, a.c, nullptr, 0);
      } else {
        const Stem<ScalarOps<typename I::S>, T> s(a, unit);
        for (int64_t ih = row; ih < last; ++ih) {
          gradient_row<ScalarOps<typename I::S>, T, A, true>(s, ih, 1, nullptr, 0);
        }
      }
    });
  });
  if (a.stream) I::fence();
}
