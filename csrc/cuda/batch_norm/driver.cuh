// The launches of one operator call, for one storage type. Instantiated by bn_<dtype>.cu.
#pragma once

#include "batch_norm/apply.cuh"
#include "batch_norm/backward.cuh"
#include "batch_norm/passes.h"

namespace fused_resnet::cuda {

inline ResidualKind residual_kind(bool given, bool has_norm) {
  return !given ? ResidualKind::kNone : has_norm ? ResidualKind::kNorm : ResidualKind::kAdd;
}

// f(Case, residual, class of activations): the kernel for the case.
template <class F>
auto pick_kernel(Layout layout, bool vector, ResidualKind residual, Activation act, F f) {
  return pick_kernel(layout, vector, act, [=](auto c, auto kind) {
    if (residual == ResidualKind::kNone) return f(c, Constant<ResidualKind::kNone>{}, kind);
    if (residual == ResidualKind::kAdd) return f(c, Constant<ResidualKind::kAdd>{}, kind);
    return f(c, Constant<ResidualKind::kNorm>{}, kind);
  });
}

// Whether whole groups may move as 16-byte vectors, as far as the row length decides.
inline bool whole_groups(const Tile& t) { return t.length % kGroup == 0; }

template <class T>
Status compute_stats(const char* failure, const void* x, const Shape& shape, const NormParams& norm, void* partials,
                     void* stream) {
  using S = Stat<T>;
  const Tile tile = make_tile(shape, kReduceBlocks);
  const StatsArgs<T> args{tile, static_cast<const T*>(x), static_cast<S*>(partials)};
  const auto kernel = pick_kernel(shape.layout, whole_groups(tile) && aligned_to(16, x),
                                  [](auto c) { return &stats_kernel<T, c.kLayout, c.kVector>; });
  const Status status =
      launch(failure, kernel, tile.blocks(), kThreads, reduce_shared_bytes(tile, sizeof(S)), stream, args);
  if (!status.ok()) return status;
  const FinalStatsArgs<T> final_args{
      tile,     shape.layout == Layout::kNHWC, static_cast<const T*>(x),   static_cast<const S*>(partials),
      norm.eps, static_cast<S*>(norm.mean),    static_cast<S*>(norm.rstd), static_cast<S*>(norm.var)};
  return launch(failure, &finalize_stats_kernel<T>, divide_up(shape.c, kFinalChannels), kFinalThreads,
                kFinalStatsShared, stream, final_args);
}

template <class T>
Status finalize_gradient(const char* failure, const FinalGradientArgs<Stat<T>>& args, void* stream) {
  return launch(failure, &finalize_gradient_kernel<Stat<T>>, divide_up(args.channels, kFinalChannels), kFinalThreads,
                kFinalGradientShared, stream, args);
}

template <class T>
Status forward(const BatchNormActForward& p) {
  using S = Stat<T>;
  static constexpr const char* kFailure = "batch_norm_act_forward: CUDA refused to start a kernel";
  const bool dual = p.residual != nullptr && p.residual_has_norm;
  if (p.mask != nullptr && p.residual == nullptr) {
    return {"batch_norm_act_forward: a mask is saved beside a residual only"};
  }
  // One after the other: both can use the same partials.
  if (p.norm.batch_stats) {
    const Status status = compute_stats<T>(kFailure, p.x, p.shape, p.norm, p.workspace, p.stream);
    if (!status.ok()) return status;
  }
  if (dual && p.residual_norm.batch_stats) {
    const Status status = compute_stats<T>(kFailure, p.residual, p.shape, p.residual_norm, p.workspace, p.stream);
    if (!status.ok()) return status;
  }
  ApplyArgs<T> a;
  a.tile = make_tile(p.shape, kMapBlocks);
  a.x = static_cast<const T*>(p.x);
  a.residual = static_cast<const T*>(p.residual);
  a.norm = norm_view<S>(p.norm);
  if (dual) a.residual_norm = norm_view<S>(p.residual_norm);
  a.act = act_view<S>(p.act);
  a.y = static_cast<T*>(p.y);
  a.mask = has_kink(p.act.kind) ? p.mask : nullptr;
  const bool vector = whole_groups(a.tile) && aligned_to(16, p.x, p.residual, p.y);
  const auto kernel =
      pick_kernel(p.shape.layout, vector, residual_kind(p.residual != nullptr, dual), p.act.kind,
                  [](auto c, auto r, auto k) { return &apply_kernel<T, c.kLayout, c.kVector, r.value, k.value>; });
  return launch(kFailure, kernel, a.tile.blocks(), kThreads, 0, p.stream, a);
}

inline bool wants_sums(const BatchNormActBackward& p, bool dual) {
  return p.norm.batch_stats || (dual && p.residual_norm.batch_stats) || p.dweight != nullptr || p.dbias != nullptr ||
         p.dresidual_weight != nullptr || p.dresidual_bias != nullptr || p.dslope != nullptr;
}

template <class T>
Status backward(const BatchNormActBackward& p) {
  using S = Stat<T>;
  static constexpr const char* kFailure = "batch_norm_act_backward: CUDA refused to start a kernel";
  const bool dual = p.residual != nullptr && p.residual_has_norm;
  // A plain residual that was not kept is known by its mask, or not needed; it still receives a gradient.
  const bool added = p.residual != nullptr || p.mask != nullptr || p.dresidual != nullptr;
  const ResidualKind kind = residual_kind(added, dual);
  BackwardArgs<T> a;
  a.tile = make_tile(p.shape, kReduceBlocks);
  const BackwardSpace<S> space(Carver(p.workspace), a.tile.padded, a.tile.chunks);
  a.dy = static_cast<const T*>(p.dy);
  a.x = static_cast<const T*>(p.x);
  a.mask = has_kink(p.act.kind) ? p.mask : nullptr;
  const bool needs_residual = dual || (a.mask == nullptr && p.act.kind != Activation::kIdentity);
  a.residual = needs_residual ? static_cast<const T*>(p.residual) : nullptr;
  if (kind == ResidualKind::kAdd && needs_residual && p.residual == nullptr) {
    return {"batch_norm_act_backward: the residual or its mask is needed to know the activation's derivative"};
  }
  if (p.dslope != nullptr && p.mask != nullptr) {
    return {"batch_norm_act_backward: the slope's gradient needs pre, which a mask does not tell"};
  }
  if (p.dslope != nullptr && class_of(p.act.kind) != ActClass::kSlope) {
    return {"batch_norm_act_backward: the activation has no slope that would get a gradient"};
  }
  a.norm = norm_view<S>(p.norm);
  if (dual) a.residual_norm = norm_view<S>(p.residual_norm);
  a.act = act_view<S>(p.act);
  a.partials = space.partials;
  a.sum_slope = p.dslope != nullptr;
  a.chain = {p.norm.batch_stats, space.b, space.c};
  a.residual_chain = {dual && p.residual_norm.batch_stats, space.residual_b, space.residual_c};
  a.dx = static_cast<T*>(p.dx);
  a.dresidual = static_cast<T*>(p.dresidual);
  const bool vector = whole_groups(a.tile) && aligned_to(16, p.dy, p.x, a.residual, p.dx, p.dresidual);

  if (wants_sums(p, dual)) {
    const auto kernel = pick_kernel(p.shape.layout, vector, kind, p.act.kind, [](auto c, auto r, auto k) {
      return &backward_reduce_kernel<T, c.kLayout, c.kVector, r.value, k.value>;
    });
    Status status =
        launch(kFailure, kernel, a.tile.blocks(), kThreads, reduce_shared_bytes(a.tile, sizeof(S)), p.stream, a);
    if (!status.ok()) return status;
    FinalGradientArgs<S> f = {};
    f.partials = space.partials;
    f.chunks = a.tile.chunks;
    f.channels = p.shape.c;
    f.padded = a.tile.padded;
    f.count = static_cast<double>(p.shape.per_channel());
    f.dual = dual;
    f.norm = gradient_out<S>(p.norm, p.dweight, p.dbias, space.b, space.c);
    f.residual =
        gradient_out<S>(p.residual_norm, p.dresidual_weight, p.dresidual_bias, space.residual_b, space.residual_c);
    f.dslope = static_cast<S*>(p.dslope);
    status = finalize_gradient<T>(kFailure, f, p.stream);
    if (!status.ok()) return status;
  }
  if (p.dx == nullptr && p.dresidual == nullptr) return {};
  a.tile = make_tile(p.shape, kMapBlocks);
  const auto kernel = pick_kernel(p.shape.layout, vector, kind, p.act.kind, [](auto c, auto r, auto k) {
    return &backward_apply_kernel<T, c.kLayout, c.kVector, r.value, k.value>;
  });
  return launch(kFailure, kernel, a.tile.blocks(), kThreads, 0, p.stream, a);
}

// What passes.h promises, for one storage type.
#define FR_INSTANTIATE_BATCH_NORM(T)                                                                         \
  template Status forward<T>(const BatchNormActForward&);                                                    \
  template Status backward<T>(const BatchNormActBackward&);                                                  \
  template Status compute_stats<T>(const char*, const void*, const Shape&, const NormParams&, void*, void*); \
  template Status finalize_gradient<T>(const char*, const FinalGradientArgs<Stat<T>>&, void*);

}  // namespace fused_resnet::cuda
