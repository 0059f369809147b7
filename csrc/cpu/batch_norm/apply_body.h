// The forward pass: see kernel_body.h, which includes this.

template <class I, class T, ActClass A, ResidualKind R, bool kNhwc>
struct Apply {
  using Element = T;
  static constexpr bool kSideBySide = false;
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
