// The stem: checks, and the way to the storage type's file.
#include "batch_norm/passes.h"
#include "pool/passes.h"
#include "pool/window.cuh"

namespace fused_resnet::cuda {
namespace {

Status check(const Shape& s, int64_t h, int64_t w) {
  if (s.numel() == 0) return {"batch_norm_act_max_pool: the tensor is empty"};
  if (h * w != s.s) return {"batch_norm_act_max_pool: h * w must be the spatial extent"};
  return {};
}

}  // namespace

int64_t batch_norm_act_max_pool_workspace(const Shape& shape, int64_t h, int64_t w) {
  if (shape.numel() == 0) return 0;
  const int64_t sums = backward_bytes(shape.dtype, make_stem_tile(shape, h, w, kReduceBlocks).tile);
  const int64_t stats = stats_bytes(shape);
  return sums > stats ? sums : stats;
}

Status batch_norm_act_max_pool_forward(const BatchNormActMaxPoolForward& p) {
  const Status status = check(p.shape, p.h, p.w);
  if (!status.ok()) return status;
  return with_storage(p.shape.dtype, [&]<class T>() { return stem_forward<T>(p); });
}

Status batch_norm_act_max_pool_backward(const BatchNormActMaxPoolBackward& p) {
  const Status status = check(p.shape, p.h, p.w);
  if (!status.ok()) return status;
  return with_storage(p.shape.dtype, [&]<class T>() { return stem_backward<T>(p); });
}

}  // namespace fused_resnet::cuda
