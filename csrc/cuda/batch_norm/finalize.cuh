// Partial sums of chunks, merged: what depends on whole channels.
//
// Mapping: a block has 8 channels (one 32-byte sector of single-precision partials) and 64 lanes, which take every 64th
// chunk; their sums are added in a fixed tree. All in double. Channels whose sums are not finite (fp32 overflows beyond
// about 1e18; or the data is not finite) are summed once more from x, two passes in double, by the whole block. It
// stops at the first NaN: a network that has diverged, all of it NaN, costs next to nothing.
#pragma once

#include "batch_norm/norm.cuh"
#include "batch_norm/stats.cuh"

namespace fused_resnet::cuda {

inline constexpr int kFinalChannels = 8, kFinalLanes = 64, kFinalThreads = kFinalChannels * kFinalLanes;

// Sum over the lanes of each channel; valid in lane 0, whose threads are the first kFinalChannels.
FR_DEVICE double sum_lanes(double* shared, double v) {
  const int i = static_cast<int>(threadIdx.x);
  __syncthreads();  // whoever read before has finished
  shared[i] = v;
  for (int half = kFinalThreads / 2; half >= kFinalChannels; half /= 2) {
    __syncthreads();
    if (i < half) shared[i] += shared[i + half];
  }
  __syncthreads();
  return shared[i % kFinalChannels];
}

// The sum over the whole block, in every thread.
FR_DEVICE double sum_all(double* shared, double v) {
  sum_lanes(shared, v);
  double sum = 0;
  for (int i = 0; i < kFinalChannels; ++i) sum += shared[i];
  return sum;
}

// Values per channel in the first `position` pixels (NHWC) or positions (NCHW).
FR_DEVICE int64_t values_before(const Tile& t, bool nhwc, int64_t position) {
  if (nhwc) return position;
  const int64_t part = position % t.groups * kGroup;
  return position / t.groups * t.length + (part < t.length ? part : t.length);
}

template <class T>
struct FinalStatsArgs {
  Tile tile;
  bool nhwc;
  const T* x;
  const Stat<T>* partials;
  double eps;
  Stat<T>*mean, *rstd, *var;  // var may be null
};

// f(x) summed over a channel by the whole block. A NaN stays one, whatever is added: the rest is not read then.
template <class T, class F>
FR_DEVICE double sum_channel(const FinalStatsArgs<T>& a, int64_t channel, double* shared, F f) {
  constexpr int64_t kPart = 16 * kFinalThreads;  // values between two looks
  const Tile& t = a.tile;
  const int64_t values = t.images * t.spatial;
  double total = 0;
  for (int64_t begin = 0; begin < values && total == total; begin += kPart) {
    const int64_t end = begin + kPart < values ? begin + kPart : values;
    double sum = 0;
    for (int64_t i = begin + threadIdx.x; i < end; i += kFinalThreads) {
      const int64_t image = i / t.spatial, position = i % t.spatial;
      const int64_t at = a.nhwc ? i * t.channels + channel : (image * t.channels + channel) * t.spatial + position;
      sum += f(static_cast<double>(to_stat(a.x[at])));
    }
    total += sum_all(shared, sum);
  }
  return total;
}

template <class T>
FR_DEVICE void write_stats(const FinalStatsArgs<T>& a, int64_t channel, double mean, double m2, double total) {
  using S = Stat<T>;
  const double var = (m2 < 0 ? 0 : m2) / total;  // keeps NaN
  a.mean[channel] = static_cast<S>(mean);
  a.rstd[channel] = static_cast<S>(1 / sqrt(var + a.eps));
  if (a.var != nullptr) a.var[channel] = static_cast<S>(var);
}

template <class T>
__global__ void __launch_bounds__(kFinalThreads, 1) finalize_stats_kernel(FinalStatsArgs<T> a) {
  const Tile& t = a.tile;
  double* const shared = reinterpret_cast<double*>(dynamic_shared());
  double* const spoiled = shared + kFinalThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kFinalChannels;
  const int64_t channel = first + threadIdx.x % kFinalChannels;
  const int64_t lane = threadIdx.x / kFinalChannels;
  const double total = static_cast<double>(t.images * t.spatial);

  // Relative to the first chunk's shift: the mean of equal values, even of doubles, comes out exactly.
  double shift = 0, sum = 0, square = 0;
  if (channel < t.channels) {
    shift = static_cast<double>(a.partials[channel]);
    for (int64_t k = lane; k < t.chunks; k += kFinalLanes) {
      const Stat<T>* p = a.partials + k * kStatSums * t.padded + channel;
      const int64_t begin = k * t.chunk, end = begin + t.chunk < t.total ? begin + t.chunk : t.total;
      const double count = static_cast<double>(values_before(t, a.nhwc, end) - values_before(t, a.nhwc, begin));
      const double delta = static_cast<double>(p[0]) - shift;
      double s = static_cast<double>(p[t.padded]), q = static_cast<double>(p[2 * t.padded]);
      move_sums(delta, count, s, q);
      sum += s;
      square += q;
    }
  }
  sum = sum_lanes(shared, sum);
  square = sum_lanes(shared, square);
  const double offset = sum / total, mean = shift + offset, m2 = square - sum * offset;
  const bool finite = mean - mean == 0 && m2 - m2 == 0;
  if (lane == 0) {
    spoiled[threadIdx.x] = channel < t.channels && !finite ? 1 : 0;
    if (channel < t.channels && finite) write_stats(a, channel, mean, m2, total);
  }
  __syncthreads();
  for (int i = 0; i < kFinalChannels; ++i) {
    if (spoiled[i] == 0) continue;
    const double again = sum_channel(a, first + i, shared, [=](double v) { return v / total; });
    // Not finite: some value is NaN or infinite, and so is its distance from the mean: NaN.
    const double rest = again - again != 0
                            ? again - again
                            : sum_channel(a, first + i, shared, [=](double v) { return (v - again) * (v - again); });
    if (threadIdx.x == 0) write_stats(a, first + i, again, rest, total);
  }
}

inline constexpr int64_t kFinalStatsShared = (kFinalThreads + kFinalChannels) * 8;

// Rows of the backward partials [chunk][kSums][padded channels].
inline constexpr int kSumG = 0;      // sum g = dbias
inline constexpr int kSumGX = 1;     // sum g * (x - mean)
inline constexpr int kSumGR = 2;     // sum g * (residual - r_mean)
inline constexpr int kSumSlope = 3;  // sum dy * pre where pre <= 0
inline constexpr int kSums = 4;

// One normalisation's share: parameter gradients (nullable), and b and c of Chain.
template <class S>
struct GradientOut {
  bool batch_stats;
  const S *rstd, *weight;
  S *dweight, *dbias, *b, *c;
};

template <class S>
struct FinalGradientArgs {
  const S* partials;
  int64_t chunks, channels, padded;
  double count;  // values per channel
  bool dual;
  GradientOut<S> norm, residual;
  S* dslope;  // nullable
};

template <class S>
FR_DEVICE void write_gradient(const GradientOut<S>& out, int64_t channel, double sum_g, double sum_gx, double count) {
  const S scale = out.weight == nullptr ? out.rstd[channel] : out.weight[channel] * out.rstd[channel];
  const double rstd = static_cast<double>(out.rstd[channel]), dw = sum_gx * rstd;
  if (out.batch_stats) {
    out.b[channel] = static_cast<S>(-static_cast<double>(scale) * rstd * dw / count);
    out.c[channel] = static_cast<S>(-static_cast<double>(scale) * sum_g / count);
  }
  if (out.dweight != nullptr) out.dweight[channel] = static_cast<S>(dw);
  if (out.dbias != nullptr) out.dbias[channel] = static_cast<S>(sum_g);
}

template <class S>
__global__ void __launch_bounds__(kFinalThreads, 1) finalize_gradient_kernel(FinalGradientArgs<S> a) {
  double* const shared = reinterpret_cast<double*>(dynamic_shared());
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kFinalChannels + threadIdx.x % kFinalChannels;
  const int64_t lane = threadIdx.x / kFinalChannels;
  const bool slope = a.dslope != nullptr;
  double g = 0, gx = 0, gr = 0, gs = 0;
  if (channel < a.channels) {
    for (int64_t k = lane; k < a.chunks; k += kFinalLanes) {
      const S* p = a.partials + k * kSums * a.padded + channel;
      g += static_cast<double>(p[kSumG * a.padded]);
      gx += static_cast<double>(p[kSumGX * a.padded]);
      if (a.dual) gr += static_cast<double>(p[kSumGR * a.padded]);
      if (slope) gs += static_cast<double>(p[kSumSlope * a.padded]);
    }
  }
  g = sum_lanes(shared, g);
  gx = sum_lanes(shared, gx);
  if (a.dual) gr = sum_lanes(shared, gr);
  if (slope) gs = sum_lanes(shared, gs);
  if (lane != 0 || channel >= a.channels) return;
  write_gradient(a.norm, channel, g, gx, a.count);
  if (a.dual) write_gradient(a.residual, channel, g, gr, a.count);
  if (slope) a.dslope[channel] = static_cast<S>(gs);
}

inline constexpr int64_t kFinalGradientShared = kFinalThreads * 8;

}  // namespace fused_resnet::cuda
