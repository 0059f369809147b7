// The stem: batch normalisation, activation and 3x3 stride-2 padding-1 max-pool
// in one pass; the normalised tensor is never written.
#pragma once

#include "fused_resnet/batch_norm.h"

namespace fused_resnet {

inline constexpr int64_t stem_pool_extent(int64_t in) { return (in - 1) / 2 + 1; }

// y is (N, C, Ho, Wo) in x's dtype and layout, Ho = stem_pool_extent(h).
// argmax has y's extent and layout, one byte per element: the winning tap
// 3 * (row in window) + (column in window). Ties: the first tap. A NaN wins,
// the last NaN over earlier ones, as torch's max_pool2d does.
struct BatchNormActMaxPoolForward {
  Shape shape;  // of x, s = h * w
  int64_t h = 0, w = 0;
  const void* x = nullptr;
  NormParams norm;
  ActParams act;
  void* y = nullptr;
  uint8_t* argmax = nullptr;  // nullable (inference)
  void* workspace = nullptr;  // batch_norm_act_max_pool_workspace() bytes, 64-byte aligned
  Runner runner;              // CPU
  void* stream = nullptr;     // CUDA: cudaStream_t of the current device
};

// dy has y's extent. Other fields as in BatchNormActBackward.
struct BatchNormActMaxPoolBackward {
  Shape shape;
  int64_t h = 0, w = 0;
  const void* dy = nullptr;
  const void* x = nullptr;
  const uint8_t* argmax = nullptr;
  NormParams norm;
  ActParams act;
  void* dx = nullptr;  // nullable
  void* dweight = nullptr;
  void* dbias = nullptr;
  void* dslope = nullptr;
  void* workspace = nullptr;
  Runner runner;           // CPU
  void* stream = nullptr;  // CUDA: cudaStream_t of the current device
};

namespace cpu {
int64_t batch_norm_act_max_pool_workspace(const Shape& shape, int64_t h, int64_t w);
Status batch_norm_act_max_pool_forward(const BatchNormActMaxPoolForward& p);
Status batch_norm_act_max_pool_backward(const BatchNormActMaxPoolBackward& p);
}  // namespace cpu

// On a GPU: see batch_norm.h.
namespace cuda {

int64_t batch_norm_act_max_pool_workspace(const Shape& shape, int64_t h, int64_t w);
Status batch_norm_act_max_pool_forward(const BatchNormActMaxPoolForward& p);
Status batch_norm_act_max_pool_backward(const BatchNormActMaxPoolBackward& p);

}  // namespace cuda

}  // namespace fused_resnet
