// Forward: y = act((x - mean) * scale + bias [+ residual | + second norm]), and the mask where one is wanted.
//
// Mapping: device/tile.cuh; last chunk first, since the statistics pass left the end of x in the second-level cache.
// A thread keeps its channels' parameters and has kBatch groups of each tensor under way. Arithmetic in the stat dtype.
// Nothing is summed: every element is computed alone. Reads x and the residual once, writes y and the mask once.
#pragma once

#include "batch_norm/norm.cuh"
#include "device/activation.cuh"

namespace fused_resnet::cuda {

template <class T>
struct ApplyArgs {
  Tile tile;
  const T *x, *residual;
  NormView<Stat<T>> norm, residual_norm;
  ActView<Stat<T>> act;
  T* y;
  uint8_t* mask;  // nullable
};

// Groups of each tensor loaded before the first is used: 64 bytes a thread, half where a second norm's parameters take
// the registers.
template <class T, ResidualKind kResidual>
inline constexpr int kApplyBatch =
    sizeof(T) == 8 ? 1 : (sizeof(T) == 4 ? 2 : 4) / (kResidual == ResidualKind::kNorm ? 2 : 1);

template <class T, Layout kLayout, bool kVector, ResidualKind kResidual, ActClass kClass>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2) apply_kernel(ApplyArgs<T> a) {
  using S = Stat<T>;
  constexpr int kBatch = kBatchOf<kLayout, kVector, kApplyBatch<T, kResidual>>;
  const Tile& t = a.tile;
  const BlockPlace block(t, true);
  const ThreadPlace<kLayout> thread(t, block);
  Cursor<kLayout, kVector> cursor(t, block, thread);
  const Norm<S, kLayout, kVector> norm(a.norm, t, thread.channel);
  const Norm<S, kLayout, kVector> second(a.residual_norm, t, kResidual == ResidualKind::kNorm ? thread.channel : 0);
  const Slope<S, kLayout, kVector> slope(a.act, t, thread.channel);

  while (cursor.inside()) {
    Place<kLayout, kVector> place[kBatch];
    Group<T> x[kBatch], residual[kBatch];
    take_places(t, cursor, place);
    FR_UNROLL
    for (int k = 0; k < kBatch; ++k) {
      x[k] = place[k].load(t, a.x);
      if constexpr (kResidual != ResidualKind::kNone) {
        residual[k] = place[k].load(t, a.residual);
      }
    }
    FR_UNROLL
    for (int k = 0; k < kBatch; ++k) {
      if (!place[k].inside) continue;
      S v[kGroup];
      FR_UNROLL
      for (int j = 0; j < kGroup; ++j) {
        v[j] = norm.affine(norm.centred(x[k][j], j), j);
        if constexpr (kResidual == ResidualKind::kAdd) v[j] += residual[k][j];
        if constexpr (kResidual == ResidualKind::kNorm) {
          v[j] += second.affine(second.centred(residual[k][j], j), j);
        }
      }
      if constexpr (kResidual != ResidualKind::kNone && kClass != ActClass::kSmooth) {
        if (a.mask != nullptr) place[k].store_mask(t, a.mask, keep_bits<kClass>(v));
      }
      act_forward<kClass>(a.act.kind, slope, v);
      place[k].store(t, a.y, v);
    }
  }
}

}  // namespace fused_resnet::cuda
