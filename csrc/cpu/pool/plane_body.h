// The stem kernels for NCHW, where a plane's rows are contiguous: the activation
// runs in vectors along a row, the windows one value at a time from small buffers.
// See kernel_body.h, which includes this.

// Input columns handled at once; their buffers stay in the first-level cache.
constexpr int64_t kColumns = 512;

// act(bn(x)) of columns [first, first + n) of input row ih.
template <class I, class T, ActClass A>
inline void activate_row(const Stem<I, T>& s, int64_t ih, int64_t first, int64_t n, typename I::S* out) {
  const PoolArgs& a = s.a;
  const auto mean = s.channel(a.mean), scale = s.channel(a.scale), bias = s.channel(a.bias);
  const auto slope = A == ActClass::kSlope ? s.channel(a.slope) : I::zero();
  const T* const x = s.x + ih * a.w + first;
  const Activation act = a.act;
  for_columns<I::kWidth>(0, n, [&](int64_t col, int64_t count) FR_INLINE {
    const auto pre = I::fma(I::sub(s.read(x + col, count), mean), scale, bias);
    const auto v = act_forward<I, A>(act, pre, slope);
    if (count == I::kWidth) {
      I::store(out + col, v);
    } else {
      store_n<I>(out + col, v, count);
    }
  });
}

template <class I, class T, ActClass A>
void pool_plane_row(const Stem<I, T>& s, int64_t oh) {
  using S = typename I::S;
  using One = ScalarOps<S>;
  const PoolArgs& a = s.a;
  S rows[3][kColumns + I::kWidth];
  int64_t row_tap[3];
  for (int64_t ow_begin = 0; ow_begin < a.ow; ow_begin += kColumns / kStride - 1) {
    const int64_t ow_end = lower(ow_begin + kColumns / kStride - 1, a.ow);
    const int64_t first = clamp(kStride * ow_begin - 1, a.w - 1), last = clamp(kStride * ow_end - 1, a.w - 1);
    for (int64_t kh = 0; kh < 3; ++kh) {
      const int64_t ih = clamp(kStride * oh - 1 + kh, a.h - 1);
      row_tap[kh] = 3 * (ih - kStride * oh + 1);
      activate_row<I, T, A>(s, ih, first, last - first + 1, rows[kh]);
    }
    for (int64_t ow = ow_begin; ow < ow_end; ++ow) {
      const int64_t begin = clamp(kStride * ow - 1, a.w - 1), end = clamp(kStride * ow + 1, a.w - 1);
      S best = rows[0][begin - first];
      int64_t tap = row_tap[0] + begin - kStride * ow + 1;
      for (int64_t kh = 0; kh < 3; ++kh) {
        for (int64_t iw = begin; iw <= end; ++iw) {
          const S v = rows[kh][iw - first];
          const bool wins = v > best || v != v;
          best = wins ? v : best;
          tap = wins ? row_tap[kh] + iw - kStride * ow + 1 : tap;
        }
      }
      const int64_t at = oh * a.ow + ow;
      One::store(s.y + at, best);
      if (s.argmax_out != nullptr) s.argmax_out[at] = static_cast<uint8_t>(tap);
    }
  }
}

// Sums of dy over the windows that columns [first, first + n) of row ih won.
template <class I, class T>
inline void scatter_row(const Stem<I, T>& s, int64_t ih, int64_t first, int64_t n, typename I::S* out) {
  using S = typename I::S;
  const PoolArgs& a = s.a;
  for (int64_t i = 0; i < n + I::kWidth; ++i) out[i] = 0;  // whole vectors are read back
  for (int64_t oh = ih / kStride; oh <= (ih + 1) / kStride && oh < a.oh; ++oh) {
    const int64_t row_tap = 3 * (ih + 1 - kStride * oh);
    const T* const dy = s.dy + oh * a.ow;
    const uint8_t* const argmax = s.argmax + oh * a.ow;
    for (int64_t ow = first / kStride; ow < a.ow && kStride * ow - 1 < first + n; ++ow) {
      const int64_t kw = argmax[ow] - row_tap, column = kStride * ow - 1 + kw - first;
      if (kw >= 0 && kw < 3 && column >= 0 && column < n) out[column] += ScalarOps<S>::load(dy + ow);
    }
  }
}

// One input row of dx, or its share of the sums.
template <class I, class T, ActClass A, bool kWrite>
void gradient_plane_row(const Stem<I, T>& s, int64_t ih, double* sums) {
  using S = typename I::S;
  const PoolArgs& a = s.a;
  const auto mean = s.channel(a.mean), scale = s.channel(a.scale), bias = s.channel(a.bias);
  const auto slope = A == ActClass::kSlope ? s.channel(a.slope) : I::zero();
  const auto b = kWrite ? s.channel(a.b) : I::zero(), c = kWrite ? s.channel(a.c_term) : I::zero();
  const bool batch = a.batch_stats, sum_slope = a.sum_slope;
  const Activation act = a.act;
  S gathered[kColumns + I::kWidth];
  auto sg = I::zero(), sx = I::zero(), sk = I::zero();
  for (int64_t first = 0; first < a.w; first += kColumns) {
    const int64_t columns = lower(kColumns, a.w - first);
    scatter_row<I, T>(s, ih, first, columns, gathered);
    const T* const x = s.x + ih * a.w + first;
    T* const dx = kWrite ? s.dx + ih * a.w + first : nullptr;
    for_columns<I::kWidth>(0, columns, [&](int64_t col, int64_t n) FR_INLINE {
      const auto xc = I::sub(s.read(x + col, n), mean);
      const auto pre = I::fma(xc, scale, bias);
      const auto dy = I::load(gathered + col);
      const auto g = act_gradient<I, A>(act, dy, pre, slope);
      if constexpr (kWrite) {
        s.write(dx + col, chain<I>(batch, g, scale, xc, b, c), n, false);
      } else {
        sg = I::add(sg, g);
        sx = I::fma(g, xc, sx);
        if constexpr (A == ActClass::kSlope) {
          if (sum_slope) sk = I::add(sk, I::select(I::gt(pre, I::zero()), I::zero(), I::mul(dy, pre)));
        }
      }
    });
  }
  if constexpr (!kWrite) {
    sums[kSumG] += I::sum(sg);
    sums[kSumGX] += I::sum(sx);
    sums[kSumSlope] += I::sum(sk);
  }
}
