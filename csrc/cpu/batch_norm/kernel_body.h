// The batch-norm kernels, once for every instruction set, dtype and layout.
//
//   stats            shifted sums of x per chunk (NHWC) or Welford/Chan per plane (NCHW)
//   apply            y = act((x - mean) * scale + bias [+ residual | + second norm])
//   backward_reduce  g = dy * act'(pre); sums of g, g * (x - mean), ... per chunk or plane
//   backward_apply   dx = g * scale + (x - mean) * b + c; dresidual likewise, or g
//
// NHWC: the contiguous axis is C; parameters are vectors read beside x. NCHW: the contiguous axis is H * W; parameters
// are broadcast per plane. Accumulation is in the stat dtype (float; double for double) over at most one chunk; the
// driver merges chunks in double and in order, so results do not depend on threads. No alignment is required except
// that `stream` asks for vector-aligned rows. Source: docs/batch_norm_math.md.
//
// Included inside an unnamed namespace after the vector headers.
#pragma once

#include "simd/activation.h"
#include "simd/rows.h"
#include "simd/vec_scalar.h"

// Short rows (NHWC with few channels) are handled several at a time, so that
// parameters and running sums are loaded once for all of them. Long rows go one
// by one: walking them side by side defeats the hardware prefetcher (measured at
// 256 channels: 0.6 of copy bandwidth instead of 1.0). Statistics, which read one
// tensor and write none, go side by side at any length and prefetch by hand.
constexpr int64_t kShortRow = 64;
// Also shortens the chain of additions of a chunk. Doubles, which serve checking, need neither.
template <class T>
constexpr int kRowsAtOnce = sizeof(T) <= 4 ? 4 : 1;
// Elements of a plane summed in the stat dtype before going to double (NCHW).
// Per lane, so that the random walk of roundings is as short for one lane as for 16.
template <class I>
constexpr int64_t kPlaneBlock = 512 * I::kWidth;

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

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

// Runs body.template rows<R>(first_row) over [begin, end).
template <class Body>
inline void for_rows(int64_t begin, int64_t end, int64_t length, Body& body) {
  int64_t row = begin;
  if constexpr (constexpr int kRows = kRowsAtOnce<typename Body::Element>; kRows > 1) {
    if (Body::kSideBySide || length <= kShortRow) {
      for (; row + kRows <= end; row += kRows) body.template rows<kRows>(row);
    }
  }
  for (; row < end; ++row) body.template rows<1>(row);
}

#include "batch_norm/apply_body.h"
#include "batch_norm/backward_body.h"
#include "batch_norm/stats_body.h"

template <class F>
inline void with_act(Activation act, F f) {
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

template <class F>
inline void with_residual(ResidualKind kind, F f) {
  switch (kind) {
    case ResidualKind::kNone:
      return f.template operator()<ResidualKind::kNone>();
    case ResidualKind::kAdd:
      return f.template operator()<ResidualKind::kAdd>();
    case ResidualKind::kNorm:
      return f.template operator()<ResidualKind::kNorm>();
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
template <class I, class Body>
inline void run_rows(const BnArgs& a, int64_t chunk_begin, int64_t chunk_end) {
  for (int64_t chunk = chunk_end - 1; chunk >= chunk_begin; --chunk) {
    const int64_t begin = chunk * a.chunk_rows, end = min64(begin + a.chunk_rows, a.rows);
    if (a.layout == Layout::kNHWC) {
      Body body(a, 0);
      for_rows(begin, end, a.length, body);
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
        run_rows<I, Apply<I, T, A, R, true>>(a, chunk_begin, chunk_end);
      } else {
        run_rows<I, Apply<I, T, A, R, false>>(a, chunk_begin, chunk_end);
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
        for_rows(begin, end, a.length, body);
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
      run_rows<I, BackwardApply<I, T, A, R, kMasked, true>>(a, chunk_begin, chunk_end);
    } else {
      run_rows<I, BackwardApply<I, T, A, R, kMasked, false>>(a, chunk_begin, chunk_end);
    }
  });
}
