// Both backward passes: see kernel_body.h, which includes this.

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
  using Element = T;
  static constexpr bool kSideBySide = false;
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
    for (int64_t block = 0; block < b.length; block += kPlaneBlock<I>) {
      auto sg = I::zero(), sx = I::zero(), sr = I::zero(), sk = I::zero();
      for_columns<I::kWidth>(block, min64(block + kPlaneBlock<I>, b.length), [&](int64_t col, int64_t n) FR_INLINE {
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
  using Element = T;
  static constexpr bool kSideBySide = false;
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
    const T* skip = in.a.skip == nullptr ? nullptr : static_cast<const T*>(in.a.skip) + row * rows.length;
    const bool stream = in.a.stream, batch = in.a.batch_stats, r_batch = in.a.r_batch_stats;
    for_columns<I::kWidth>(0, rows.length, [&](int64_t col, int64_t n) FR_INLINE {
      const auto p = in.column(col);
      const auto ps = scale.at(col), pb = b.at(col), pc = c.at(col);
      const auto rs = R == ResidualKind::kNorm ? r_scale.at(col) : I::zero();
      const auto rb = R == ResidualKind::kNorm ? r_b.at(col) : I::zero();
      const auto rc = R == ResidualKind::kNorm ? r_c.at(col) : I::zero();
      for (int r = 0; r < Rows; ++r) {
        const auto v = in.at(rows, p, r, col, n);
        const int64_t at = r * rows.length + col;
        if (dx != nullptr) {
          auto out = chain<I>(batch, v.g, ps, v.xc, pb, pc);
          if constexpr (R == ResidualKind::kNone && A == ActClass::kIdentity) {
            if (skip != nullptr) out = I::add(out, read<I>(skip + at, n));
          }
          write<I>(dx + at, out, n, stream);
        }
        if constexpr (R == ResidualKind::kAdd) {
          if (dr != nullptr) write<I>(dr + at, v.g, n, stream);
        }
        if constexpr (R == ResidualKind::kNorm) {
          if (dr != nullptr) write<I>(dr + at, chain<I>(r_batch, v.g, rs, v.rc, rb, rc), n, stream);
        }
      }
    });
  }
};
