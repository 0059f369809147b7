// The stem on the CPU: statistics come from the batch-norm forward's first half,
// then one pass over windows; backward merges chunk sums in double, in order.
#include <algorithm>

#include "batch_norm/merge_sums.h"
#include "batch_norm/params.h"
#include "batch_norm/stats.h"
#include "dispatch.h"
#include "fused_resnet/pool.h"
#include "parallel.h"

namespace fused_resnet::cpu {
namespace {

// Input elements a chunk covers: small enough to balance threads, large enough
// that partial sums are few. Few channels: at most so many pixels, so that
// single-precision sums stay short.
constexpr int64_t kChunkElements = 65536;
constexpr int64_t kMaxChunkPixels = 1024;

struct StemGrid {
  int64_t rows, units, chunk_rows, chunks_per_image, chunks, padded;
  // `height` rows a unit, each standing for `row_elements` input elements.
  StemGrid(const Shape& s, int64_t height, int64_t row_elements) {
    const bool nhwc = s.layout == Layout::kNHWC;
    units = nhwc ? s.n : s.n * s.c;
    rows = height;
    const int64_t most = nhwc ? std::min(kChunkElements, kMaxChunkPixels * s.c) : kChunkElements;
    const int64_t fit = most / (row_elements > 0 ? row_elements : 1);
    chunk_rows = fit < 1 ? 1 : fit < height ? fit : height;
    chunks_per_image = (height + chunk_rows - 1) / chunk_rows;
    chunks = units * chunks_per_image;
    padded = padded_channels(s.c);
  }
};

int64_t row_elements(const Shape& s, int64_t w) { return s.layout == Layout::kNHWC ? w * s.c : w; }

// By rows of windows, or of pixels: what the kernels walk.
StemGrid window_grid(const Shape& s, int64_t h, int64_t w) {
  return StemGrid(s, stem_pool_extent(h), 2 * row_elements(s, w));
}
StemGrid backward_grid(const Shape& s, int64_t h, int64_t w) {
  return s.layout == Layout::kNHWC ? window_grid(s, h, w) : StemGrid(s, h, row_elements(s, w));
}

template <class S>
struct StemSpace {
  NormArrays<S> norm;
  GradientArrays<S> gradient;
  S* slope;
  char* partials;
  int64_t bytes;
  StemSpace(Carver carver, const Shape& s, const StemGrid& backward)
      : norm(carver, backward.padded),
        gradient(carver, backward.padded),
        slope(carver.take<S>(backward.padded)),
        partials(nullptr),
        bytes(0) {
    const int64_t sums = s.layout == Layout::kNHWC ? backward.chunks * kSums * backward.padded * stat_size(s.dtype)
                                                   : backward.chunks * kSums * 8;
    const int64_t stats = stats_workspace(s);
    partials = carver.take<char>(sums > stats ? sums : stats);
    bytes = carver.used();
  }
};

PoolArgs base_args(const Shape& s, int64_t h, int64_t w, const StemGrid& g) {
  PoolArgs a;
  a.n = s.n;
  a.c = s.c;
  a.h = h;
  a.w = w;
  a.oh = stem_pool_extent(h);
  a.ow = stem_pool_extent(w);
  a.chunk_rows = g.chunk_rows;
  a.chunks_per_image = g.chunks_per_image;
  a.channels_padded = g.padded;
  a.layout = s.layout;
  return a;
}

template <class S>
void point_at(PoolArgs& a, const StemSpace<S>& space) {
  a.mean = space.norm.mean;
  a.scale = space.norm.scale;
  a.bias = space.norm.bias;
  a.slope = space.slope;
}

void run(PoolKernel kernel, const PoolArgs& a, const StemGrid& g, const Shape& s, const Runner& runner) {
  for_chunks(runner, g.chunks, s.numel(), [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

template <class S>
void forward(const BatchNormActMaxPoolForward& p) {
  const StemGrid g = window_grid(p.shape, p.h, p.w);
  StemSpace<S> space(Carver(p.workspace), p.shape, backward_grid(p.shape, p.h, p.w));
  if (p.norm.batch_stats) compute_stats(p.x, p.shape, p.norm, space.partials, p.runner);
  space.norm.fill(p.norm, p.shape.c, g.padded);
  fill_slope(space.slope, p.act, p.shape.c, g.padded);
  PoolArgs a = base_args(p.shape, p.h, p.w, g);
  a.x = p.x;
  a.y = p.y;
  a.argmax_out = p.argmax;
  a.act = p.act.kind;
  point_at(a, space);
  run(pool_kernel(PoolPass::forward, p.shape.dtype), a, g, p.shape, p.runner);
}

template <class S>
void backward(const BatchNormActMaxPoolBackward& p) {
  const StemGrid g = backward_grid(p.shape, p.h, p.w);
  StemSpace<S> space(Carver(p.workspace), p.shape, g);
  space.norm.fill(p.norm, p.shape.c, g.padded);
  fill_slope(space.slope, p.act, p.shape.c, g.padded);
  space.gradient.zero(g.padded);
  PoolArgs a = base_args(p.shape, p.h, p.w, g);
  a.x = p.x;
  a.dy = p.dy;
  a.argmax = p.argmax;
  a.act = p.act.kind;
  a.sum_slope = p.dslope != nullptr;
  a.batch_stats = p.norm.batch_stats;
  a.partials = space.partials;
  a.b = space.gradient.b;
  a.c_term = space.gradient.c;
  point_at(a, space);
  if (p.norm.batch_stats || p.dweight != nullptr || p.dbias != nullptr || p.dslope != nullptr) {
    run(pool_kernel(PoolPass::backward_reduce, p.shape.dtype), a, g, p.shape, p.runner);
    const double per_channel = static_cast<double>(p.shape.per_channel());
    MergedSums merged;
    for (int64_t first = 0; first < p.shape.c; first += kMergeChannels) {
      const int64_t count = p.shape.c - first < kMergeChannels ? p.shape.c - first : kMergeChannels;
      if (p.shape.layout == Layout::kNHWC) {
        merge_by_channel(reinterpret_cast<const S*>(space.partials), g.chunks, g.padded, first, count, &merged);
      } else {
        merge_by_plane(reinterpret_cast<const double*>(space.partials), p.shape.n, p.shape.c, g.chunks_per_image, first,
                       count, &merged);
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t c = first + i;
        space.gradient.set(c, p.norm, space.norm.scale[c], merged.sum[kSumG][i], merged.sum[kSumGX][i], per_channel,
                           p.dweight, p.dbias);
        if (p.dslope != nullptr) static_cast<S*>(p.dslope)[c] = static_cast<S>(merged.sum[kSumSlope][i]);
      }
    }
  }
  if (p.dx == nullptr) return;
  a.dx = p.dx;
  const int64_t item = element_size(p.shape.dtype);
  const int64_t row_bytes = p.shape.layout == Layout::kNHWC ? p.shape.c * item : 1;
  a.stream = stream_stores(3 * p.shape.numel() * item, row_bytes, p.dx, nullptr);
  run(pool_kernel(PoolPass::backward_apply, p.shape.dtype), a, g, p.shape, p.runner);
}

Status check(const Shape& s, int64_t h, int64_t w) {
  if (s.numel() == 0) return {"batch_norm_act_max_pool: the tensor is empty"};
  if (h * w != s.s) return {"batch_norm_act_max_pool: h * w must be the spatial extent"};
  return {};
}

}  // namespace

int64_t batch_norm_act_max_pool_workspace(const Shape& shape, int64_t h, int64_t w) {
  const StemGrid g = backward_grid(shape, h, w);
  const Carver count(nullptr);
  return shape.dtype == DType::kFloat64 ? StemSpace<double>(count, shape, g).bytes
                                        : StemSpace<float>(count, shape, g).bytes;
}

Status batch_norm_act_max_pool_forward(const BatchNormActMaxPoolForward& p) {
  const Status status = check(p.shape, p.h, p.w);
  if (!status.ok()) return status;
  p.shape.dtype == DType::kFloat64 ? forward<double>(p) : forward<float>(p);
  return {};
}

Status batch_norm_act_max_pool_backward(const BatchNormActMaxPoolBackward& p) {
  const Status status = check(p.shape, p.h, p.w);
  if (!status.ok()) return status;
  p.shape.dtype == DType::kFloat64 ? backward<double>(p) : backward<float>(p);
  return {};
}

}  // namespace fused_resnet::cpu
