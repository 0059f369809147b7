// Batch normalisation fused with residual add and activation: the contract.
//
//   xhat = (x - mean) * rstd                       per channel
//   pre  = xhat * weight + bias  [+ residual | + batch_norm'(residual)]
//   y    = act(pre)
//
// rstd is always 1/sqrt(var + eps), var the biased variance. Symbols and the
// backward formulas: docs/batch_norm_math.md.
#pragma once

#include <cstddef>

#include "fused_resnet/types.h"

namespace fused_resnet {

// One batch normalisation's per-channel operands; every array is (C,) stat dtype.
struct NormParams {
  bool batch_stats = false;      // true: mean, rstd, var are computed from the input
  double eps = 1e-5;             // > 0
  const void* weight = nullptr;  // null: ones
  const void* bias = nullptr;    // null: zeros
  void* mean = nullptr;          // written when batch_stats, else read
  void* rstd = nullptr;          // written when batch_stats, else read
  void* var = nullptr;           // written when batch_stats (may be null), never read
};

struct ActParams {
  Activation kind = Activation::kIdentity;
  double negative_slope = 0.01;  // leaky_relu
  const void* slope = nullptr;   // prelu: (C,) stat dtype
};

// residual null: none. residual given: added as it is, or through its own batch
// normalisation when `residual_has_norm`.
struct BatchNormActForward {
  Shape shape;
  const void* x = nullptr;
  NormParams norm;
  const void* residual = nullptr;  // shape, dtype and layout of x
  bool residual_has_norm = false;
  NormParams residual_norm;
  ActParams act;
  void* y = nullptr;          // shape, dtype and layout of x; may not alias an input
  uint8_t* mask = nullptr;    // nullable; batch_norm_act_mask_bytes(): bit = gradient passes
  void* workspace = nullptr;  // batch_norm_act_forward_workspace() bytes, 64-byte aligned
  Runner runner;              // CPU
  void* stream = nullptr;     // CUDA: cudaStream_t of the current device
};

// What relu and leaky_relu save when a residual makes `pre` unrecoverable from x:
// one bit per element, rows of the contiguous axis padded to whole bytes.
int64_t batch_norm_act_mask_bytes(const Shape& shape);

// Gradients. The derivative of the activation comes from `mask` when given, else
// `pre` is recomputed from x (and residual, which must then be given if the
// forward had one). dx, dresidual may be null (not wanted). The (C,) gradients
// are always written when their pointer is given. norm.batch_stats tells whether
// the statistics depended on x; mean and rstd are read.
struct BatchNormActBackward {
  Shape shape;
  const void* dy = nullptr;  // shape, dtype and layout of x
  const void* x = nullptr;
  NormParams norm;
  const void* residual = nullptr;
  bool residual_has_norm = false;
  NormParams residual_norm;
  ActParams act;
  const uint8_t* mask = nullptr;
  void* dx = nullptr;
  void* dresidual = nullptr;
  void* dweight = nullptr;  // (C,) stat dtype, as all below
  void* dbias = nullptr;
  void* dresidual_weight = nullptr;  // with residual_has_norm
  void* dresidual_bias = nullptr;    // with residual_has_norm
  void* dslope = nullptr;            // prelu
  void* workspace = nullptr;         // batch_norm_act_backward_workspace() bytes, 64-byte aligned
  Runner runner;                     // CPU
  void* stream = nullptr;            // CUDA: cudaStream_t of the current device
};

// running <- (1 - momentum) * running + momentum * batch, variance unbiased by
// count / (count - 1). running arrays are (C,) of `running_dtype`; mean and var
// are (C,) of the stat dtype of `dtype`.
struct BatchNormUpdateRunning {
  int64_t c = 0;
  DType dtype = DType::kFloat32;
  DType running_dtype = DType::kFloat32;
  const void* mean = nullptr;
  const void* var = nullptr;
  int64_t count = 0;  // values per channel, > 1
  double momentum = 0.1;
  void* running_mean = nullptr;
  void* running_var = nullptr;
  void* stream = nullptr;  // CUDA: cudaStream_t of the current device
};

// mean <- running_mean, rstd <- 1 / sqrt(running_var + eps): copies, so that a later training step cannot change what
// backward of this one reads. All arrays are (C,) of the stat dtype of `dtype`.
struct BatchNormFixedStats {
  int64_t c = 0;
  DType dtype = DType::kFloat32;
  double eps = 1e-5;  // > 0
  const void* running_mean = nullptr;
  const void* running_var = nullptr;
  void* mean = nullptr;
  void* rstd = nullptr;
  void* stream = nullptr;  // CUDA: cudaStream_t of the current device
};

// Statistics of x alone: mean, rstd and var of `norm` are written. The CPU's only, as what follows.
struct BatchNormStatistics {
  Shape shape;
  const void* x = nullptr;
  NormParams norm;
  void* workspace = nullptr;  // batch_norm_statistics_workspace() bytes, 64-byte aligned
  Runner runner;
};

// dx of y = norm(x) where whoever computed dy has summed it too: dweight and dbias are read.
//   dx = scale * (dy - dbias / M - xhat * dweight / M) [+ skip],   or scale * dy [+ skip] with fixed statistics
struct BatchNormInputGradient {
  Shape shape;
  const void* dy = nullptr;
  const void* x = nullptr;
  NormParams norm;
  const void* dweight = nullptr;
  const void* dbias = nullptr;
  const void* skip = nullptr;  // nullable; shape, dtype and layout of x
  void* dx = nullptr;
  void* workspace = nullptr;  // batch_norm_act_backward_workspace() bytes, 64-byte aligned
  Runner runner;
};

namespace cpu {
int64_t batch_norm_statistics_workspace(const Shape& shape);
Status batch_norm_statistics(const BatchNormStatistics& p);
Status batch_norm_input_gradient(const BatchNormInputGradient& p);
int64_t batch_norm_act_forward_workspace(const Shape& shape);
int64_t batch_norm_act_backward_workspace(const Shape& shape);
Status batch_norm_act_forward(const BatchNormActForward& p);
Status batch_norm_act_backward(const BatchNormActBackward& p);
Status batch_norm_update_running(const BatchNormUpdateRunning& p);
Status batch_norm_fixed_stats(const BatchNormFixedStats& p);
}  // namespace cpu

// The same contracts on a GPU (docs/cuda.md): every pointer is memory of the current device, work is queued on `stream`
// and nothing waits for it. A launch that fails is a Status.
namespace cuda {

int64_t batch_norm_act_forward_workspace(const Shape& shape);
int64_t batch_norm_act_backward_workspace(const Shape& shape);
Status batch_norm_act_forward(const BatchNormActForward& p);
Status batch_norm_act_backward(const BatchNormActBackward& p);
Status batch_norm_update_running(const BatchNormUpdateRunning& p);
Status batch_norm_fixed_stats(const BatchNormFixedStats& p);

}  // namespace cuda

}  // namespace fused_resnet
