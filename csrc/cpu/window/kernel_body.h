// Pooling over windows, once for every instruction set and dtype. Included inside an unnamed namespace after the vector
// headers.
#pragma once

#include "simd/rows.h"
#include "simd/vec_scalar.h"

// Taps [first, last) of the window that begins at `start`, inside an image of `extent`.
struct TapRange {
  int64_t first, last;
  TapRange(int64_t start, int64_t taps, int64_t dilation, int64_t extent) {
    first = start < 0 ? (dilation - 1 - start) / dilation : 0;
    const int64_t inside = extent > start ? (extent - start + dilation - 1) / dilation : 0;
    last = inside < taps ? inside : taps;
  }
  int64_t count() const { return last > first ? last - first : 0; }
};

// Elements of a mean's window along one axis, the padding included.
inline int64_t padded_extent(int64_t start, int64_t kernel, int64_t pad, int64_t extent) {
  const int64_t end = start + kernel < extent + pad ? start + kernel : extent + pad;
  return end - start;
}

template <class I, class T, WindowKind K>
inline void window_row(const WindowForward& p, int64_t image, int64_t row, int64_t c0, int64_t c1) {
  using S = typename I::S;
  using V = typename I::V;
  const T* x = static_cast<const T*>(p.x) + image * p.h * p.w * p.c;
  T* y = static_cast<T*>(p.y) + (image * p.out_h + row) * p.out_w * p.c;
  const int64_t top = row * p.stride_h - p.pad_h;
  const TapRange rows(top, p.kernel_h, p.dilation_h, p.h);
  for (int64_t i = 0; i < p.out_w; ++i) {
    const int64_t left = i * p.stride_w - p.pad_w;
    const TapRange cols(left, p.kernel_w, p.dilation_w, p.w);
    int64_t count = rows.count() * cols.count();
    if (p.count_padding) {
      count = padded_extent(top, p.kernel_h, p.pad_h, p.h) * padded_extent(left, p.kernel_w, p.pad_w, p.w);
    }
    const V share = I::set1(S(1) / static_cast<S>(count > 0 ? count : 1));
    for_columns<I::kWidth>(c0, c1, [&](int64_t column, int64_t n) FR_INLINE {
      V value = K == WindowKind::kMax ? I::set1(-__builtin_inf()) : I::zero();
      for (int64_t r = rows.first; r < rows.last; ++r) {
        const T* line = x + ((top + r * p.dilation_h) * p.w + left) * p.c + column;
        for (int64_t s = cols.first; s < cols.last; ++s) {
          const T* at = line + s * p.dilation_w * p.c;
          const V v = n == I::kWidth ? I::load(at) : load_n<I>(at, n);
          if constexpr (K == WindowKind::kMax) {
            value = I::select(I::or_(I::gt(v, value), I::is_nan(v)), v, value);
          } else {
            value = I::add(value, v);
          }
        }
      }
      if constexpr (K == WindowKind::kMean) value = I::mul(value, share);
      T* to = y + i * p.c + column;
      n == I::kWidth ? I::store(to, value) : store_n<I>(to, value, n);
    });
  }
}

template <class I, class T, WindowKind K>
inline void window(const WindowArgs& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item / a.blocks, c0 = item % a.blocks * a.block;
    window_row<I, T, K>(a.p, row / a.p.out_h, row % a.p.out_h, c0, c0 + a.block < a.p.c ? c0 + a.block : a.p.c);
  }
}
