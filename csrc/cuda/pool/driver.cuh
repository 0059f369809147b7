// The launches of one stem call, for one storage type. Instantiated by pool_<dtype>.cu.
#pragma once

#include "batch_norm/passes.h"
#include "pool/backward.cuh"
#include "pool/passes.h"

namespace fused_resnet::cuda {

// Doubles are for checking, and their vectors take more registers than there are.
template <class T, class C>
inline constexpr bool kStemVector = C::kVector && sizeof(T) <= 4;

// Whole groups, and rows of pixels and of windows that begin on 16-byte boundaries.
inline bool whole_groups(const StemTile& s, Layout layout) {
  return layout == Layout::kNHWC ? s.tile.channels % kGroup == 0 : s.ow % kGroup == 0 && s.w % kGroup == 0;
}

template <class T>
Status stem_forward(const BatchNormActMaxPoolForward& p) {
  using S = Stat<T>;
  static constexpr const char* kFailure = "batch_norm_act_max_pool_forward: CUDA refused to start a kernel";
  if (p.norm.batch_stats) {
    const Status status = compute_stats<T>(kFailure, p.x, p.shape, p.norm, p.workspace, p.stream);
    if (!status.ok()) return status;
  }
  StemForwardArgs<T> a;
  a.stem = make_stem_tile(p.shape, p.h, p.w, kMapBlocks);
  a.x = static_cast<const T*>(p.x);
  a.norm = norm_view<S>(p.norm);
  a.act = act_view<S>(p.act);
  a.y = static_cast<T*>(p.y);
  a.argmax = p.argmax;
  const bool vector = whole_groups(a.stem, p.shape.layout) && aligned_to(16, p.x, p.y) && aligned_to(8, p.argmax);
  const auto kernel = pick_kernel(p.shape.layout, vector, p.act.kind, [](auto c, auto k) {
    return &stem_forward_kernel<T, c.kLayout, kStemVector<T, decltype(c)>, k.value>;
  });
  return launch(kFailure, kernel, a.stem.tile.blocks(), kThreads, 0, p.stream, a);
}

template <class T>
Status stem_backward(const BatchNormActMaxPoolBackward& p) {
  using S = Stat<T>;
  static constexpr const char* kFailure = "batch_norm_act_max_pool_backward: CUDA refused to start a kernel";
  if (p.dslope != nullptr && class_of(p.act.kind) != ActClass::kSlope) {
    return {"batch_norm_act_max_pool_backward: the activation has no slope that would get a gradient"};
  }
  StemBackwardArgs<T> a;
  a.stem = make_stem_tile(p.shape, p.h, p.w, kReduceBlocks);
  const Tile& t = a.stem.tile;
  const BackwardSpace<S> space(Carver(p.workspace), t.padded, t.chunks);
  a.dy = static_cast<const T*>(p.dy);
  a.x = static_cast<const T*>(p.x);
  a.argmax = p.argmax;
  a.norm = norm_view<S>(p.norm);
  a.act = act_view<S>(p.act);
  a.partials = space.partials;
  a.sum_slope = p.dslope != nullptr;
  a.chain = {p.norm.batch_stats, space.b, space.c};
  a.dx = static_cast<T*>(p.dx);
  const bool vector =
      whole_groups(a.stem, p.shape.layout) && aligned_to(16, p.dy, p.x, p.dx) && aligned_to(8, p.argmax);

  if (p.norm.batch_stats || p.dweight != nullptr || p.dbias != nullptr || p.dslope != nullptr) {
    const auto kernel = pick_kernel(p.shape.layout, vector, p.act.kind, [](auto c, auto k) {
      return &stem_reduce_kernel<T, c.kLayout, kStemVector<T, decltype(c)>, k.value>;
    });
    Status status = launch(kFailure, kernel, t.blocks(), kThreads, reduce_shared_bytes(t, sizeof(S)), p.stream, a);
    if (!status.ok()) return status;
    FinalGradientArgs<S> f = {};
    f.partials = space.partials;
    f.chunks = t.chunks;
    f.channels = p.shape.c;
    f.padded = t.padded;
    f.count = static_cast<double>(p.shape.per_channel());
    f.norm = gradient_out<S>(p.norm, p.dweight, p.dbias, space.b, space.c);
    f.dslope = static_cast<S*>(p.dslope);
    status = finalize_gradient<T>(kFailure, f, p.stream);
    if (!status.ok()) return status;
  }
  if (p.dx == nullptr) return {};
  a.stem = make_stem_tile(p.shape, p.h, p.w, kMapBlocks);
  const auto kernel = pick_kernel(p.shape.layout, vector, p.act.kind, [](auto c, auto k) {
    return &stem_apply_kernel<T, c.kLayout, kStemVector<T, decltype(c)>, k.value>;
  });
  return launch(kFailure, kernel, t.blocks(), kThreads, 0, p.stream, a);
}

// What passes.h promises, for one storage type.
#define FR_INSTANTIATE_STEM(T)                                        \
  template Status stem_forward<T>(const BatchNormActMaxPoolForward&); \
  template Status stem_backward<T>(const BatchNormActMaxPoolBackward&);

}  // namespace fused_resnet::cuda
