// Statistics: chunk sums by the kernels, merged here in double, in chunk order.
#include "stats.h"

#include <cmath>

#include "grid.h"
#include "host_float.h"
#include "merge_sums.h"

namespace fused_resnet::cpu {
namespace {

// Merging in double: sum d and sum d^2 of all chunks, d = x - shift. The mean is taken as a difference from the shift,
// so that even the mean of equal doubles is exact.
template <class S>
void merge_nhwc(const S* partials, const Grid& g, int64_t channel, int64_t count, Moments* out) {
  const double total = static_cast<double>(g.rows);
  const S* shift = partials + channel;
  for (int64_t i = 0; i < count; ++i) out[i] = {0, 0};
  for (int64_t k = 0; k < g.chunks; ++k) {
    const S* sum = partials + (k * kStatSums + 1) * g.padded + channel;
    const S* square = sum + g.padded;
    for (int64_t i = 0; i < count; ++i) {
      out[i].mean += static_cast<double>(sum[i]);
      out[i].m2 += static_cast<double>(square[i]);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const double offset = out[i].mean / total;
    out[i].m2 -= out[i].mean * offset;
    out[i].mean = static_cast<double>(shift[i]) + offset;
  }
}

Moments merge_nchw(const double* partials, const Shape& s, int64_t channel) {
  const double first = partials[channel * 2];
  double mean = 0;
  for (int64_t n = 1; n < s.n; ++n) mean += partials[(n * s.c + channel) * 2] - first;
  mean = first + mean / static_cast<double>(s.n);
  double m2 = 0;
  for (int64_t n = 0; n < s.n; ++n) {
    const double* p = partials + (n * s.c + channel) * 2;
    const double e = p[0] - mean;
    m2 += p[1] + static_cast<double>(s.s) * e * e;
  }
  return {mean, m2};
}

// Single-precision sums overflowed, or the data is not finite: once more, all in
// double. Slow, exact, and only for the channels that need it.
Moments exact_moments(const void* x, const Shape& s, int64_t channel) {
  const int64_t step = s.layout == Layout::kNHWC ? s.c : 1;
  const double total = static_cast<double>(s.per_channel());
  double mean = 0, m2 = 0;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t n = 0; n < s.n; ++n) {
      const int64_t begin = s.layout == Layout::kNHWC ? n * s.s * s.c + channel : (n * s.c + channel) * s.s;
      for (int64_t i = 0; i < s.s; ++i) {
        const double v = load_element(x, s.dtype, begin + i * step);
        if (std::isnan(v)) return {v, v};
        if (pass == 0) {
          mean += v / total;
        } else {
          m2 += (v - mean) * (v - mean);
        }
      }
    }
  }
  return {mean, m2};
}

template <class S>
void write_channel(const NormParams& norm, int64_t c, Moments m, double total) {
  const double var = (m.m2 < 0 ? 0 : m.m2) / total;  // keeps NaN
  static_cast<S*>(norm.mean)[c] = static_cast<S>(m.mean);
  static_cast<S*>(norm.rstd)[c] = static_cast<S>(1 / std::sqrt(var + norm.eps));
  if (norm.var != nullptr) static_cast<S*>(norm.var)[c] = static_cast<S>(var);
}

template <class S>
void finish_stats(const void* x, const Shape& s, const Grid& g, const NormParams& norm, const void* partials,
                  int64_t begin, int64_t end) {
  Moments merged[kMergeChannels];
  for (int64_t first = begin; first < end; first += kMergeChannels) {
    const int64_t count = end - first < kMergeChannels ? end - first : kMergeChannels;
    if (s.layout == Layout::kNHWC) {
      merge_nhwc(static_cast<const S*>(partials), g, first, count, merged);
    } else {
      for (int64_t i = 0; i < count; ++i) merged[i] = merge_nchw(static_cast<const double*>(partials), s, first + i);
    }
    for (int64_t i = 0; i < count; ++i) write_stats(norm, s, x, first + i, merged[i]);
  }
}

}  // namespace

void write_stats(const NormParams& norm, const Shape& shape, const void* x, int64_t c, Moments m) {
  if (!std::isfinite(m.mean) || !std::isfinite(m.m2)) m = exact_moments(x, shape, c);
  const double total = static_cast<double>(shape.per_channel());
  shape.dtype == DType::kFloat64 ? write_channel<double>(norm, c, m, total) : write_channel<float>(norm, c, m, total);
}

int64_t stats_workspace(const Shape& s) {
  const Grid g(s);
  return s.layout == Layout::kNHWC ? g.chunks * kStatSums * g.padded * stat_size(s.dtype) : g.rows * 2 * 8;
}

void compute_stats(const void* x, const Shape& s, const NormParams& norm, void* partials, const Runner& runner) {
  const Grid g(s);
  BnArgs a = base_args(s, g);
  a.x = x;
  a.partials = partials;
  run(bn_kernel(BnPass::stats, s.dtype), a, g, s, runner);
  const int64_t merges = s.c * (s.layout == Layout::kNHWC ? g.chunks : s.n);
  for_chunks(runner, s.c, merges * 4, [&](int64_t begin, int64_t end) {
    if (s.dtype == DType::kFloat64) {
      finish_stats<double>(x, s, g, norm, partials, begin, end);
    } else {
      finish_stats<float>(x, s, g, norm, partials, begin, end);
    }
  });
}

}  // namespace fused_resnet::cpu
