// The batch-norm kernels, once for every instruction set, dtype and layout.
//
//   stats            shifted sums of x per chunk (NHWC) or Welford/Chan per plane (NCHW)
//   apply            y = act((x - mean) * scale + bias [+ residual | + second norm])
//   backward_reduce  g = dy * act'(pre); sums of g, g * (x - mean), ... per chunk or plane
//   backward_apply   dx = g * scale + (x - mean) * b + c; dresidual likewise, or g
//
// NHWC: the contiguous axis is C; parameters are vectors read beside x, several
// rows at a time so that they and the running sums are read once for all of
// them. NCHW: the contiguous axis is H * W; parameters are broadcast per plane.
// Accumulation is in the stat dtype (float; double for double) over at most one
// chunk; the driver merges chunks in double and in order, so results do not
// depend on threads. No alignment is required except that `stream` asks for
// vector-aligned rows. Source: docs/batch_norm_math.md.
//
// Included inside an unnamed namespace after the vector headers.

// Rows handled together in NHWC: enough to amortise parameter loads, few enough
// for the hardware prefetcher's streams (two to four inputs per row).
constexpr int kForwardRows = 4;
constexpr int kBackwardRows = 4;
constexpr int kStatRows = 8;
// Elements of a plane summed in the stat dtype before going to double (NCHW).
constexpr int64_t kPlaneBlock = 4096;

// Loop bodies must be inlined: only then is a full vector's `n` a constant.
#define FR_INLINE __attribute__((always_inline))

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls f(column, n) for every vector of a row, n < width only for the last.
template <int kWidth, class F>
FR_INLINE inline void for_columns(int64_t begin, int64_t end, F f) {
  int64_t column = begin;
  for (; column + kWidth <= end; column += kWidth) f(column, static_cast<int64_t>(kWidth));
  if (column < end) f(column, end - column);
}

// One per-channel array seen from the inner loop.
template <class I, bool kNhwc>
struct Param {
  using S = typename I::S;
  const S* p;
  typename I::V broadcast;
  Param(const void* array, int64_t channel) : p(static_cast<const S*>(array)), broadcast(I::zero()) {
    if constexpr (!kNhwc) {
      if (p != nullptr) broadcast = I::set1(p[channel]);
    }
  }
  typename I::V at(int64_t column) const {
    if constexpr (kNhwc) return I::load(p + column);  // padded: whole vectors are always readable
    return broadcast;
  }
};

template <class I, class T>
FR_INLINE inline typename I::V read(const T* p, int64_t n) {
  return n == I::kWidth ? I::load(p) : load_n<I>(p, n);
}
template <class I, class T>
FR_INLINE inline void write(T* p, typename I::V v, int64_t n, bool stream) {
  if (n != I::kWidth) {
    store_n<I>(p, v, n);
  } else if (stream) {
    I::stream(p, v);
  } else {
    I::store(p, v);
  }
}

// Runs body.template rows<R>(first_row) over [begin, end) in blocks of R rows, then singly.
template <int R, class Body>
inline void for_row_blocks(int64_t begin, int64_t end, Body& body) {
  int64_t row = begin;
  for (; row + R <= end; row += R) body.template rows<R>(row);
  for (; row < end; ++row) body.template rows<1>(row);
}

// ---------------------------------------------------------------- statistics

template <class I, class T>
struct StatsNhwc {
  using S = typename I::S;
  const T* x;
  int64_t length;
  const S* shift;
  S *sum, *square;

  template <int R>
  void rows(int64_t row) {
    const int64_t pitch = length;
    const T* base = x + row * pitch;
    const S* k_row = shift;
    S *sum_row = sum, *square_row = square;
    for_columns<I::kWidth>(0, pitch, [&](int64_t col, int64_t n) FR_INLINE {
      const auto k = I::load(k_row + col);
      auto s = I::zero(), q = I::zero();
      for (int r = 0; r < R; ++r) {
        const auto d = I::sub(read<I>(base + r * pitch + col, n), k);
        s = I::add(s, d);
        q = I::fma(d, d, q);
      }
      I::store(sum_row + col, I::add(I::load(sum_row + col), s));
      I::store(square_row + col, I::add(I::load(square_row + col), q));
    });
  }
};

template <class I, class T>
void stats_nhwc(const BnArgs& a, int64_t chunk_begin, int64_t chunk_end) {
  using S = typename I::S;
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    const int64_t begin = chunk * a.chunk_rows, end = min64(begin + a.chunk_rows, a.rows);
    S* shift = static_cast<S*>(a.partials) + chunk * kStatSums * a.channels_padded;
    StatsNhwc<I, T> body{static_cast<const T*>(a.x), a.length, shift, shift + a.channels_padded,
                         shift + 2 * a.channels_padded};
    // The shift is the mean of the first rows: close to the chunk's mean, so
    // that the sum of squares does not cancel.
    const int64_t lead = min64(kStatRows, end - begin);
    const auto inverse = I::set1(static_cast<S>(1) / static_cast<S>(lead));
    for_columns<I::kWidth>(0, a.length, [&](int64_t col, int64_t n) FR_INLINE {
      auto s = I::zero();
      for (int64_t r = 0; r < lead; ++r) {
        s = I::fma(read<I>(body.x + (begin + r) * a.length + col, n), inverse, s);
      }
      I::store(shift + col, s);
      I::store(body.sum + col, I::zero());
      I::store(body.square + col, I::zero());
    });
    for_row_blocks<kStatRows>(begin, end, body);
  }
}

template <class I, class T>
void stats_nchw(const BnArgs& a, int64_t chunk_begin, int64_t chunk_end) {
  using S = typename I::S;
  const int64_t begin = chunk_begin * a.chunk_rows, end = min64(chunk_end * a.chunk_rows, a.rows);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.length;
    const int64_t lead = min64(I::kWidth, a.length);
    const S shift = static_cast<S>(I::sum(load_n<I>(x, lead)) / static_cast<double>(lead));
    const auto k = I::set1(shift);
    double mean = 0, m2 = 0, count = 0;  // of x - shift, over the blocks so far
    for (int64_t block = 0; block < a.length; block += kPlaneBlock) {
      const int64_t block_end = min64(block + kPlaneBlock, a.length);
      auto s0 = I::zero(), s1 = I::zero(), q0 = I::zero(), q1 = I::zero();
      int64_t col = block;
      for (; col + 2 * I::kWidth <= block_end; col += 2 * I::kWidth) {
        const auto d0 = I::sub(I::load(x + col), k), d1 = I::sub(I::load(x + col + I::kWidth), k);
        s0 = I::add(s0, d0);
        s1 = I::add(s1, d1);
        q0 = I::fma(d0, d0, q0);
        q1 = I::fma(d1, d1, q1);
      }
      double sum = I::sum(s0) + I::sum(s1), square = I::sum(q0) + I::sum(q1);
      for (; col < block_end; ++col) {
        const double d = static_cast<double>(ScalarOps<S>::load(x + col)) - static_cast<double>(shift);
        sum += d;
        square += d * d;
      }
      const double n = static_cast<double>(block_end - block);
      const double block_mean = sum / n, delta = block_mean - mean, total = count + n;
      m2 += (square - sum * block_mean) + delta * delta * count * n / total;
      mean += delta * n / total;
      count = total;
    }
    double* out = static_cast<double*>(a.partials) + row * 2;
    out[0] = static_cast<double>(shift) + mean;
    out[1] = m2;
  }
}

// --------------------------------------------------------------------- apply

template <class I, class T, ActClass A, ResidualKind R, bool kNhwc>
struct Apply {
  const BnArgs& a;
  Param<I, kNhwc> mean, scale, bias, r_mean, r_scale, r_bias, slope;
  int64_t mask_pitch;

  Apply(const BnArgs& args, int64_t channel)
      : a(args),
        mean(args.mean, channel),
        scale(args.scale, channel),
        bias(args.bias, channel),
        r_mean(args.r_mean, channel),
        r_scale(args.r_scale, channel),
        r_bias(args.r_bias, channel),
        slope(args.slope, channel),
        mask_pitch((args.length + 7) / 8) {}

  template <int Rows>
  void rows(int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * a.length;
    const T* residual = static_cast<const T*>(a.residual) + (R == ResidualKind::kNone ? 0 : row * a.length);
    T* y = static_cast<T*>(a.y) + row * a.length;
    const int64_t length = a.length, pitch = mask_pitch;
    uint8_t* mask = a.mask_out == nullptr ? nullptr : a.mask_out + row * pitch;
    const bool stream = a.stream;
    const Activation act = a.act;
    for_columns<I::kWidth>(0, length, [&](int64_t col, int64_t n) FR_INLINE {
      const auto m = mean.at(col), s = scale.at(col), t = bias.at(col);
      const auto k = A == ActClass::kSlope ? slope.at(col) : I::zero();
      const auto rm = R == ResidualKind::kNorm ? r_mean.at(col) : I::zero();
      const auto rs = R == ResidualKind::kNorm ? r_scale.at(col) : I::zero();
      const auto rt = R == ResidualKind::kNorm ? r_bias.at(col) : I::zero();
      for (int r = 0; r < Rows; ++r) {
        const int64_t at = r * length + col;
        auto pre = I::fma(I::sub(read<I>(x + at, n), m), s, t);
        if constexpr (R == ResidualKind::kAdd) pre = I::add(pre, read<I>(residual + at, n));
        if constexpr (R == ResidualKind::kNorm) {
          pre = I::add(pre, I::fma(I::sub(read<I>(residual + at, n), rm), rs, rt));
        }
        if constexpr (R != ResidualKind::kNone && (A == ActClass::kRelu || A == ActClass::kSlope)) {
          if (mask != nullptr) {
            store_bits<I::kWidth>(mask + r * pitch, col, n, I::bits(keep_mask<I, A>(pre)));
          }
        }
        write<I>(y + at, act_forward<I, A>(act, pre, k), n, stream);
      }
    });
  }
};

// ------------------------------------------------------------------ backward

// g = dy * act'(pre) with x - mean and residual - r_mean, for one vector.
template <class I>
struct Gradient {
  typename I::V g, xc, rc, pre;
};

template <class I, class T, ActClass A, ResidualKind R, bool kMasked, bool kNhwc>
struct BackwardInputs {
  const BnArgs& a;
  Param<I, kNhwc> mean, scale, bias, r_mean, r_scale, r_bias, slope;
  int64_t mask_pitch;

  BackwardInputs(const BnArgs& args, int64_t channel)
      : a(args),
        mean(args.mean, channel),
        scale(args.scale, channel),
        bias(args.bias, channel),
        r_mean(args.r_mean, channel),
        r_scale(args.r_scale, channel),
        r_bias(args.r_bias, channel),
        slope(args.slope, channel),
        mask_pitch((args.length + 7) / 8) {}

  struct Column {
    typename I::V m, s, t, rm, rs, rt, k;
  };
  Column column(int64_t col) const {
    constexpr bool pre = A != ActClass::kIdentity && !kMasked;
    constexpr bool norm = R == ResidualKind::kNorm;
    return {mean.at(col),
            pre ? scale.at(col) : I::zero(),
            pre ? bias.at(col) : I::zero(),
            norm ? r_mean.at(col) : I::zero(),
            norm && pre ? r_scale.at(col) : I::zero(),
            norm && pre ? r_bias.at(col) : I::zero(),
            A == ActClass::kSlope ? slope.at(col) : I::zero()};
  }

  // A block of rows, in locals that stores to the outputs cannot alias.
  struct Rows {
    const T *dy, *x, *residual;
    const uint8_t* mask;
    int64_t length, mask_pitch;
    Activation act;
  };
  Rows rows_at(int64_t row) const {
    const int64_t at = row * a.length;
    const T* residual = static_cast<const T*>(a.residual);
    return {static_cast<const T*>(a.dy) + at,
            static_cast<const T*>(a.x) + at,
            residual == nullptr ? nullptr : residual + at,
            kMasked ? a.mask + row * mask_pitch : nullptr,
            a.length,
            mask_pitch,
            a.act};
  }

  FR_INLINE static Gradient<I> at(const Rows& b, const Column& p, int64_t row, int64_t col, int64_t n) {
    const int64_t at = row * b.length + col;
    Gradient<I> out;
    const auto dy = read<I>(b.dy + at, n);
    out.xc = I::sub(read<I>(b.x + at, n), p.m);
    out.rc = I::zero();
    out.pre = I::zero();
    if constexpr (R == ResidualKind::kNorm) {
      out.rc = I::sub(read<I>(b.residual + at, n), p.rm);
    }
    if constexpr (A == ActClass::kIdentity) {
      out.g = dy;
    } else if constexpr (kMasked) {
      const auto keep = I::from_bits(load_bits<I::kWidth>(b.mask + row * b.mask_pitch, col, n));
      out.g = act_masked_gradient<I, A>(keep, dy, p.k);
    } else {
      out.pre = I::fma(out.xc, p.s, p.t);
      if constexpr (R == ResidualKind::kAdd) {
        out.pre = I::add(out.pre, read<I>(b.residual + at, n));
      }
      if constexpr (R == ResidualKind::kNorm) out.pre = I::add(out.pre, I::fma(out.rc, p.rs, p.rt));
      out.g = act_gradient<I, A>(b.act, dy, out.pre, p.k);
    }
    return out;
  }

  // prelu: what this vector adds to the slope's gradient.
  FR_INLINE static typename I::V slope_term(const Rows& b, const Gradient<I>& v, int64_t row, int64_t col, int64_t n) {
    const auto dy = read<I>(b.dy + row * b.length + col, n);
    return I::select(I::gt(v.pre, I::zero()), I::zero(), I::mul(dy, v.pre));
  }
};

template <class I, class T, ActClass A, ResidualKind R, bool kMasked>
struct ReduceNhwc {
  BackwardInputs<I, T, A, R, kMasked, true> in;
  typename I::S* sums;

  template <int Rows>
  void rows(int64_t row) {
    const int64_t pitch = in.a.channels_padded;
    const auto b = in.rows_at(row);
    const bool slope = in.a.sum_slope;
    typename I::S* out = sums;
    for_columns<I::kWidth>(0, b.length, [&](int64_t col, int64_t n) FR_INLINE {
      const auto p = in.column(col);
      auto sg = I::zero(), sx = I::zero(), sr = I::zero(), sk = I::zero();
      for (int r = 0; r < Rows; ++r) {
        const auto v = in.at(b, p, r, col, n);
        sg = I::add(sg, v.g);
        sx = I::fma(v.g, v.xc, sx);
        if constexpr (R == ResidualKind::kNorm) sr = I::fma(v.g, v.rc, sr);
        if constexpr (A == ActClass::kSlope && !kMasked) {
          if (slope) sk = I::add(sk, in.slope_term(b, v, r, col, n));
        }
      }
      accumulate(out + kSumG * pitch + col, sg);
      accumulate(out + kSumGX * pitch + col, sx);
      if constexpr (R == ResidualKind::kNorm) accumulate(out + kSumGR * pitch + col, sr);
      if constexpr (A == ActClass::kSlope && !kMasked) accumulate(out + kSumSlope * pitch + col, sk);
    });
  }
  static void accumulate(typename I::S* p, typename I::V v) { I::store(p, I::add(I::load(p), v)); }
};

template <class I, class T, ActClass A, ResidualKind R, bool kMasked>
struct ReduceNchw {
  BackwardInputs<I, T, A, R, kMasked, false> in;

  void plane(int64_t row, double* out) const {
    for (int s = 0; s < kSums; ++s) out[s] = 0;
    const auto p = in.column(0);
    const auto b = in.rows_at(row);
    const bool slope = in.a.sum_slope;
    for (int64_t block = 0; block < b.length; block += kPlaneBlock) {
      auto sg = I::zero(), sx = I::zero(), sr = I::zero(), sk = I::zero();
      for_columns<I::kWidth>(block, min64(block + kPlaneBlock, b.length), [&](int64_t col, int64_t n) FR_INLINE {
        const auto v = in.at(b, p, 0, col, n);
        sg = I::add(sg, v.g);
        sx = I::fma(v.g, v.xc, sx);
        if constexpr (R == ResidualKind::kNorm) sr = I::fma(v.g, v.rc, sr);
        if constexpr (A == ActClass::kSlope && !kMasked) {
          if (slope) sk = I::add(sk, in.slope_term(b, v, 0, col, n));
        }
      });
      out[kSumG] += I::sum(sg);
      out[kSumGX] += I::sum(sx);
      out[kSumGR] += I::sum(sr);
      out[kSumSlope] += I::sum(sk);
    }
  }
};

template <class I, class T, ActClass A, ResidualKind R, bool kMasked, bool kNhwc>
struct BackwardApply {
  BackwardInputs<I, T, A, R, kMasked, kNhwc> in;
  Param<I, kNhwc> scale, b, c, r_scale, r_b, r_c;

  BackwardApply(const BnArgs& a, int64_t channel)
      : in(a, channel),
        scale(a.scale, channel),
        b(a.b, channel),
        c(a.c, channel),
        r_scale(a.r_scale, channel),
        r_b(a.r_b, channel),
        r_c(a.r_c, channel) {}

  template <int Rows>
  void rows(int64_t row) {
    const auto rows = in.rows_at(row);
    T* dx = in.a.dx == nullptr ? nullptr : static_cast<T*>(in.a.dx) + row * rows.length;
    T* dr = in.a.dresidual == nullptr ? nullptr : static_cast<T*>(in.a.dresidual) + row * rows.length;
    const bool stream = in.a.stream;
    for_columns<I::kWidth>(0, rows.length, [&](int64_t col, int64_t n) FR_INLINE {
      const auto p = in.column(col);
      const auto ps = scale.at(col), pb = b.at(col), pc = c.at(col);
      const auto rs = R == ResidualKind::kNorm ? r_scale.at(col) : I::zero();
      const auto rb = R == ResidualKind::kNorm ? r_b.at(col) : I::zero();
      const auto rc = R == ResidualKind::kNorm ? r_c.at(col) : I::zero();
      for (int r = 0; r < Rows; ++r) {
        const auto v = in.at(rows, p, r, col, n);
        const int64_t at = r * rows.length + col;
        if (dx != nullptr) write<I>(dx + at, I::fma(v.g, ps, I::fma(v.xc, pb, pc)), n, stream);
        if constexpr (R == ResidualKind::kAdd) {
          if (dr != nullptr) write<I>(dr + at, v.g, n, stream);
        }
        if constexpr (R == ResidualKind::kNorm) {
          if (dr != nullptr) write<I>(dr + at, I::fma(v.g, rs, I::fma(v.rc, rb, rc)), n, stream);
        }
      }
    });
  }
};

// ------------------------------------------------------- from run time to types

template <class F>
inline void with_act(Activation act, F f) {
  switch (act_class(act)) {
    case ActClass::kIdentity: return f.template operator()<ActClass::kIdentity>();
    case ActClass::kRelu: return f.template operator()<ActClass::kRelu>();
    case ActClass::kSlope: return f.template operator()<ActClass::kSlope>();
    case ActClass::kSmooth: return f.template operator()<ActClass::kSmooth>();
  }
}

template <class F>
inline void with_residual(ResidualKind kind, F f) {
  switch (kind) {
    case ResidualKind::kNone: return f.template operator()<ResidualKind::kNone>();
    case ResidualKind::kAdd: return f.template operator()<ResidualKind::kAdd>();
    case ResidualKind::kNorm: return f.template operator()<ResidualKind::kNorm>();
  }
}

// Activation, residual and mask together, leaving out what cannot occur: a mask
// exists only for relu and slopes, and only beside a residual.
template <class F>
inline void with_backward_case(const BnArgs& a, F f) {
  with_act(a.act, [&]<ActClass A>() {
    with_residual(a.residual_kind, [&]<ResidualKind R>() {
      if constexpr ((A == ActClass::kRelu || A == ActClass::kSlope) && R != ResidualKind::kNone) {
        if (a.mask != nullptr) return f.template operator()<A, R, true>();
      }
      f.template operator()<A, R, false>();
    });
  });
}

template <class I, class T>
void stats(const BnArgs& a, int64_t chunk_begin, int64_t chunk_end) {
  if (a.layout == Layout::kNHWC) return stats_nhwc<I, T>(a, chunk_begin, chunk_end);
  stats_nchw<I, T>(a, chunk_begin, chunk_end);
}

// Last chunk first: the pass before this one left the end of its range in cache.
template <class I, class Body, int kRows>
inline void run_rows(const BnArgs& a, int64_t chunk_begin, int64_t chunk_end) {
  for (int64_t chunk = chunk_end - 1; chunk >= chunk_begin; --chunk) {
    const int64_t begin = chunk * a.chunk_rows, end = min64(begin + a.chunk_rows, a.rows);
    if (a.layout == Layout::kNHWC) {
      Body body(a, 0);
      for_row_blocks<kRows>(begin, end, body);
    } else {
      for (int64_t row = begin; row < end; ++row) Body(a, row % a.channels).template rows<1>(row);
    }
  }
  if (a.stream) I::fence();
}

template <class I, class T>
void apply(const BnArgs& a, int64_t chunk_begin, int64_t chunk_end) {
  with_act(a.act, [&]<ActClass A>() {
    with_residual(a.residual_kind, [&]<ResidualKind R>() {
      if (a.layout == Layout::kNHWC) {
        run_rows<I, Apply<I, T, A, R, true>, kForwardRows>(a, chunk_begin, chunk_end);
      } else {
        run_rows<I, Apply<I, T, A, R, false>, 1>(a, chunk_begin, chunk_end);
      }
    });
  });
}

template <class I, class T>
void backward_reduce(const BnArgs& a, int64_t chunk_begin, int64_t chunk_end) {
  using S = typename I::S;
  with_backward_case(a, [&]<ActClass A, ResidualKind R, bool kMasked>() {
    for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
      const int64_t begin = chunk * a.chunk_rows, end = min64(begin + a.chunk_rows, a.rows);
      if (a.layout == Layout::kNHWC) {
        S* sums = static_cast<S*>(a.partials) + chunk * kSums * a.channels_padded;
        for (int64_t i = 0; i < kSums * a.channels_padded; ++i) sums[i] = 0;
        ReduceNhwc<I, T, A, R, kMasked> body{{a, 0}, sums};
        for_row_blocks<kBackwardRows>(begin, end, body);
      } else {
        for (int64_t row = begin; row < end; ++row) {
          const ReduceNchw<I, T, A, R, kMasked> body{{a, row % a.channels}};
          body.plane(row, static_cast<double*>(a.partials) + row * kSums);
        }
      }
    }
  });
}

template <class I, class T>
void backward_apply(const BnArgs& a, int64_t chunk_begin, int64_t chunk_end) {
  with_backward_case(a, [&]<ActClass A, ResidualKind R, bool kMasked>() {
    if (a.layout == Layout::kNHWC) {
      run_rows<I, BackwardApply<I, T, A, R, kMasked, true>, kBackwardRows>(a, chunk_begin, chunk_end);
    } else {
      run_rows<I, BackwardApply<I, T, A, R, kMasked, false>, 1>(a, chunk_begin, chunk_end);
    }
  });
}
