// Batch norm + residual + activation: checks, and the way to the storage type's file.
#include "batch_norm/passes.h"

namespace fused_resnet::cuda {

int64_t stats_bytes(const Shape& shape) {
  const Tile t = make_tile(shape, kReduceBlocks);
  return t.chunks * kStatSums * t.padded * stat_size(shape.dtype);
}

int64_t batch_norm_act_forward_workspace(const Shape& shape) { return shape.numel() == 0 ? 0 : stats_bytes(shape); }

int64_t batch_norm_act_backward_workspace(const Shape& shape) {
  return shape.numel() == 0 ? 0 : backward_bytes(shape.dtype, make_tile(shape, kReduceBlocks));
}

Status batch_norm_act_forward(const BatchNormActForward& p) {
  if (p.shape.numel() == 0) return {"batch_norm_act_forward: an empty tensor has no statistics"};
  return with_storage(p.shape.dtype, [&]<class T>() { return forward<T>(p); });
}

Status batch_norm_act_backward(const BatchNormActBackward& p) {
  if (p.shape.numel() == 0) return {"batch_norm_act_backward: an empty tensor has no gradient"};
  return with_storage(p.shape.dtype, [&]<class T>() { return backward<T>(p); });
}

}  // namespace fused_resnet::cuda
