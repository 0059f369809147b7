// Batch norm on the CPU: chunks the tensor, runs the kernels over it on the
// caller's threads, and merges their partial sums in double, in chunk order.
#include "fused_resnet/batch_norm.h"
#include "grid.h"
#include "merge_sums.h"
#include "stats.h"

namespace fused_resnet {

int64_t batch_norm_act_mask_bytes(const Shape& s) {
  return s.layout == Layout::kNHWC ? s.per_channel() * ((s.c + 7) / 8) : s.n * s.c * ((s.s + 7) / 8);
}

namespace cpu {
namespace {

int64_t backward_partials_bytes(const Shape& s, const Grid& g) {
  return s.layout == Layout::kNHWC ? g.chunks * kSums * g.padded * stat_size(s.dtype) : g.rows * kSums * 8;
}

template <class S>
struct ForwardSpace {
  NormArrays<S> norm, residual;
  S* slope;
  char* partials;
  int64_t bytes;
  ForwardSpace(Carver carver, const Shape& s, const Grid& g)
      : norm(carver, g.padded),
        residual(carver, g.padded),
        slope(carver.take<S>(g.padded)),
        partials(carver.take<char>(stats_workspace(s))),
        bytes(carver.used()) {}
};

template <class S>
struct BackwardSpace {
  NormArrays<S> norm, residual;
  GradientArrays<S> gradient, residual_gradient;
  S* slope;
  char* partials;
  int64_t bytes;
  BackwardSpace(Carver carver, const Shape& s, const Grid& g)
      : norm(carver, g.padded),
        residual(carver, g.padded),
        gradient(carver, g.padded),
        residual_gradient(carver, g.padded),
        slope(carver.take<S>(g.padded)),
        partials(carver.take<char>(backward_partials_bytes(s, g))),
        bytes(carver.used()) {}
};

ResidualKind residual_kind(const void* residual, bool has_norm) {
  return residual == nullptr ? ResidualKind::kNone : has_norm ? ResidualKind::kNorm : ResidualKind::kAdd;
}

template <class S>
void point_at(BnArgs& a, const NormArrays<S>& norm, const NormArrays<S>& residual, const S* slope) {
  a.mean = norm.mean;
  a.scale = norm.scale;
  a.bias = norm.bias;
  a.r_mean = residual.mean;
  a.r_scale = residual.scale;
  a.r_bias = residual.bias;
  a.slope = slope;
}

template <class S>
void forward(const BatchNormActForward& p) {
  const Grid g(p.shape);
  ForwardSpace<S> space(Carver(p.workspace), p.shape, g);
  if (p.norm.batch_stats) compute_stats(p.x, p.shape, p.norm, space.partials, p.runner);
  space.norm.fill(p.norm, p.shape.c, g.padded);
  const bool dual = p.residual != nullptr && p.residual_has_norm;
  if (dual) {
    if (p.residual_norm.batch_stats) {
      compute_stats(p.residual, p.shape, p.residual_norm, space.partials, p.runner);
    }
    space.residual.fill(p.residual_norm, p.shape.c, g.padded);
  }
  fill_slope(space.slope, p.act, p.shape.c, g.padded);

  BnArgs a = base_args(p.shape, g);
  a.x = p.x;
  a.residual = p.residual;
  a.residual_kind = residual_kind(p.residual, p.residual_has_norm);
  a.act = p.act.kind;
  a.y = p.y;
  a.mask_out = p.mask;
  point_at(a, space.norm, space.residual, space.slope);
  const int64_t item = element_size(p.shape.dtype), tensors = p.residual == nullptr ? 2 : 3;
  a.stream = stream_stores(tensors * p.shape.numel() * item, g.length * item, p.y, nullptr);
  run(bn_kernel(BnPass::apply, p.shape.dtype), a, g, p.shape, p.runner);
}

bool wants_sums(const BatchNormActBackward& p, bool dual) {
  return p.norm.batch_stats || (dual && p.residual_norm.batch_stats) || p.dweight != nullptr || p.dbias != nullptr ||
         p.dresidual_weight != nullptr || p.dresidual_bias != nullptr || p.dslope != nullptr;
}

template <class S>
void finish_gradients(const BatchNormActBackward& p, const Grid& g, BackwardSpace<S>& space, bool dual, int64_t begin,
                      int64_t end) {
  const double per_channel = static_cast<double>(p.shape.per_channel());
  MergedSums merged;
  for (int64_t first = begin; first < end; first += kMergeChannels) {
    const int64_t count = end - first < kMergeChannels ? end - first : kMergeChannels;
    if (p.shape.layout == Layout::kNHWC) {
      merge_by_channel(reinterpret_cast<const S*>(space.partials), g.chunks, g.padded, first, count, &merged);
    } else {
      merge_by_plane(reinterpret_cast<const double*>(space.partials), p.shape.n, p.shape.c, 1, first, count, &merged);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t c = first + i;
      const double sum_g = merged.sum[kSumG][i];
      space.gradient.set(c, p.norm, space.norm.scale[c], sum_g, merged.sum[kSumGX][i], per_channel, p.dweight, p.dbias);
      if (dual) {
        space.residual_gradient.set(c, p.residual_norm, space.residual.scale[c], sum_g, merged.sum[kSumGR][i],
                                    per_channel, p.dresidual_weight, p.dresidual_bias);
      }
      if (p.dslope != nullptr) static_cast<S*>(p.dslope)[c] = static_cast<S>(merged.sum[kSumSlope][i]);
    }
  }
}

template <class S>
void backward(const BatchNormActBackward& p) {
  const Grid g(p.shape);
  const bool dual = p.residual != nullptr && p.residual_has_norm;
  BackwardSpace<S> space(Carver(p.workspace), p.shape, g);
  space.norm.fill(p.norm, p.shape.c, g.padded);
  if (dual) space.residual.fill(p.residual_norm, p.shape.c, g.padded);
  fill_slope(space.slope, p.act, p.shape.c, g.padded);
  space.gradient.zero(g.padded);
  space.residual_gradient.zero(g.padded);

  BnArgs a = base_args(p.shape, g);
  a.x = p.x;
  a.dy = p.dy;
  a.residual = p.residual;
  // A plain residual that was not kept is known by its mask, or not needed; it
  // still receives a gradient.
  const bool added = p.residual != nullptr || p.mask != nullptr || p.dresidual != nullptr;
  a.residual_kind = dual ? ResidualKind::kNorm : added ? ResidualKind::kAdd : ResidualKind::kNone;
  a.act = p.act.kind;
  a.mask = p.mask;
  a.sum_slope = p.dslope != nullptr;
  a.batch_stats = p.norm.batch_stats;
  a.r_batch_stats = dual && p.residual_norm.batch_stats;
  a.partials = space.partials;
  point_at(a, space.norm, space.residual, space.slope);
  a.b = space.gradient.b;
  a.c = space.gradient.c;
  a.r_b = space.residual_gradient.b;
  a.r_c = space.residual_gradient.c;

  if (wants_sums(p, dual)) {
    run(bn_kernel(BnPass::backward_reduce, p.shape.dtype), a, g, p.shape, p.runner);
    const int64_t merges = p.shape.c * (p.shape.layout == Layout::kNHWC ? g.chunks : p.shape.n);
    for_chunks(p.runner, p.shape.c, merges * 4,
               [&](int64_t begin, int64_t end) { finish_gradients<S>(p, g, space, dual, begin, end); });
  }
  if (p.dx == nullptr && p.dresidual == nullptr) return;
  a.dx = p.dx;
  a.dresidual = p.dresidual;
  const int64_t item = element_size(p.shape.dtype);
  const int64_t tensors = 3 + (dual ? 1 : 0) + (p.dresidual != nullptr ? 1 : 0);
  a.stream = stream_stores(tensors * p.shape.numel() * item, g.length * item, p.dx, p.dresidual);
  run(bn_kernel(BnPass::backward_apply, p.shape.dtype), a, g, p.shape, p.runner);
}

template <class S>
void input_gradient(const BatchNormInputGradient& p) {
  const Grid g(p.shape);
  BackwardSpace<S> space(Carver(p.workspace), p.shape, g);
  space.norm.fill(p.norm, p.shape.c, g.padded);
  space.gradient.zero(g.padded);
  const double per_channel = static_cast<double>(p.shape.per_channel());
  for (int64_t c = 0; p.norm.batch_stats && c < p.shape.c; ++c) {
    const double dweight = static_cast<double>(static_cast<const S*>(p.dweight)[c]);
    const double dbias = static_cast<double>(static_cast<const S*>(p.dbias)[c]);
    space.gradient.set(c, p.norm, space.norm.scale[c], dbias, dweight, per_channel);
  }
  BnArgs a = base_args(p.shape, g);
  a.x = p.x;
  a.dy = p.dy;
  a.skip = p.skip;
  a.dx = p.dx;
  a.batch_stats = p.norm.batch_stats;
  a.mean = space.norm.mean;
  a.scale = space.norm.scale;
  a.b = space.gradient.b;
  a.c = space.gradient.c;
  const int64_t item = element_size(p.shape.dtype), tensors = p.skip == nullptr ? 3 : 4;
  a.stream = stream_stores(tensors * p.shape.numel() * item, g.length * item, p.dx, nullptr);
  run(bn_kernel(BnPass::backward_apply, p.shape.dtype), a, g, p.shape, p.runner);
}

}  // namespace

int64_t batch_norm_statistics_workspace(const Shape& shape) { return stats_workspace(shape); }

Status batch_norm_statistics(const BatchNormStatistics& p) {
  if (p.shape.numel() == 0) return {"batch_norm_statistics: an empty tensor has no statistics"};
  compute_stats(p.x, p.shape, p.norm, p.workspace, p.runner);
  return {};
}

Status batch_norm_input_gradient(const BatchNormInputGradient& p) {
  if (p.shape.numel() == 0) return {"batch_norm_input_gradient: an empty tensor has no gradient"};
  p.shape.dtype == DType::kFloat64 ? input_gradient<double>(p) : input_gradient<float>(p);
  return {};
}

int64_t batch_norm_act_forward_workspace(const Shape& shape) {
  const Grid g(shape);
  const Carver count(nullptr);
  return shape.dtype == DType::kFloat64 ? ForwardSpace<double>(count, shape, g).bytes
                                        : ForwardSpace<float>(count, shape, g).bytes;
}

int64_t batch_norm_act_backward_workspace(const Shape& shape) {
  const Grid g(shape);
  const Carver count(nullptr);
  return shape.dtype == DType::kFloat64 ? BackwardSpace<double>(count, shape, g).bytes
                                        : BackwardSpace<float>(count, shape, g).bytes;
}

Status batch_norm_act_forward(const BatchNormActForward& p) {
  if (p.shape.numel() == 0) return {"batch_norm_act_forward: an empty tensor has no statistics"};
  if (p.mask != nullptr && p.residual == nullptr) {
    return {"batch_norm_act_forward: a mask is saved beside a residual only"};
  }
  p.shape.dtype == DType::kFloat64 ? forward<double>(p) : forward<float>(p);
  return {};
}

Status batch_norm_act_backward(const BatchNormActBackward& p) {
  if (p.shape.numel() == 0) return {"batch_norm_act_backward: an empty tensor has no gradient"};
  const bool recompute = p.mask == nullptr && p.act.kind != Activation::kIdentity;
  if (recompute && p.residual == nullptr && p.dresidual != nullptr) {
    return {"batch_norm_act_backward: the residual or its mask is needed to know the activation's derivative"};
  }
  if (p.dslope != nullptr && p.mask != nullptr) {
    return {"batch_norm_act_backward: the slope's gradient needs pre, which a mask does not tell"};
  }
  p.shape.dtype == DType::kFloat64 ? backward<double>(p) : backward<float>(p);
  return {};
}

}  // namespace cpu
}  // namespace fused_resnet
