// Statistics kernels: see kernel_body.h, which includes this.

// Which of `count` values the shift is made of: a sixty-fourth, but at least 8 and at most 32, spread evenly by the
// golden ratio. (Equal steps would meet the same column of every image, and that may be the border, at another level.)
struct Samples {
  int64_t count, at[32];
  explicit Samples(int64_t values) : count(min64(values, values < 512 ? 8 : min64(values / 64, 32))) {
    for (int64_t i = 0; i < count; ++i) {
      const double turns = (static_cast<double>(i) + 0.5) * 0.6180339887498949;
      const double part = turns - static_cast<double>(static_cast<int64_t>(turns));
      at[i] = static_cast<int64_t>(part * static_cast<double>(values));
    }
  }
};

// The shift is the mean of a few values spread over the tensor (NCHW: the plane): close to its mean, so that the sum of
// squares does not cancel. NHWC has one for all chunks: reading eight far-apart rows of each first cost as much as half
// the pass (measured). It is rounded to a value of T: differences of coarse numbers (bf16, fp16) then have few bits and
// add up nearly exactly, where an arbitrary shift would bend every rounding the same way (measured: 5 times the error).
template <class I, class T, class Read>
FR_INLINE inline typename I::V shift_of(const Samples& samples, Read value) {
  const auto inverse = I::set1(static_cast<typename I::S>(1) / static_cast<typename I::S>(samples.count));
  const auto first = value(samples.at[0]);  // differences from it: exactly zero for a constant
  auto s = first;
  for (int64_t i = 1; i < samples.count; ++i) s = I::fma(I::sub(value(samples.at[i]), first), inverse, s);
  T stored[I::kWidth];
  I::store(stored, s);
  return I::load(stored);
}

template <class I, class T>
struct StatsNhwc {
  using Element = T;
  static constexpr bool kSideBySide = true;
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
        const T* p = base + r * pitch + col;
        __builtin_prefetch(p + R * pitch);  // the next rows; past the tensor's end it does nothing
        const auto d = I::sub(read<I>(p, n), k);
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
  const T* x = static_cast<const T*>(a.x);
  const int64_t pitch = kStatSums * a.channels_padded;
  S* shift = static_cast<S*>(a.partials) + chunk_begin * pitch;  // every thread finds the same one
  const Samples samples(a.rows);
  for_columns<I::kWidth>(0, a.length, [&](int64_t col, int64_t n) FR_INLINE {
    I::store(shift + col,
             shift_of<I, T>(samples, [&](int64_t at) FR_INLINE { return read<I>(x + at * a.length + col, n); }));
  });
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    const int64_t begin = chunk * a.chunk_rows, end = min64(begin + a.chunk_rows, a.rows);
    S* sum = static_cast<S*>(a.partials) + chunk * pitch + a.channels_padded;
    S* square = sum + a.channels_padded;
    for (int64_t i = 0; i < a.channels_padded; ++i) sum[i] = square[i] = 0;
    StatsNhwc<I, T> body{x, a.length, shift, sum, square};
    for_rows(begin, end, a.length, body);
  }
}

template <class I, class T>
void stats_nchw(const BnArgs& a, int64_t chunk_begin, int64_t chunk_end) {
  using S = typename I::S;
  const int64_t begin = chunk_begin * a.chunk_rows, end = min64(chunk_end * a.chunk_rows, a.rows);
  const Samples samples(a.length);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.length;
    const S shift =
        shift_of<ScalarOps<S>, T>(samples, [&](int64_t at) FR_INLINE { return ScalarOps<S>::load(x + at); });
    const auto k = I::set1(shift);
    double mean = 0, m2 = 0, count = 0;  // of x - shift, over the blocks so far
    for (int64_t block = 0; block < a.length; block += kPlaneBlock<I>) {
      const int64_t block_end = min64(block + kPlaneBlock<I>, a.length);
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
