// From (pass, dtype) to the kernel that runs on this machine now.
#pragma once

#include "batch_norm/kernels.h"
#include "conv/kernels.h"
#include "conv/weight_kernels.h"
#include "isa.h"
#include "pool/kernels.h"
#include "window/kernels.h"

namespace fused_resnet::cpu {

enum class BnPass : uint8_t { stats, apply, backward_reduce, backward_apply };
enum class PoolPass : uint8_t { forward, backward_reduce, backward_apply };
enum class WindowPass : uint8_t { max, mean };

enum class ConvPass : uint8_t {
  convolve,
  pack,
  weight_gradient,
  winograd,
  winograd_pack,
  winograd_weight,
  grouped,
  grouped_pack,
  grouped_weight
};

struct ConvKernels {
  ConvKernel convolve;
  ConvPackKernel pack;
  ConvTraits traits;
  const char *name, *pack_name;
};

BnKernel bn_kernel(BnPass pass, DType dtype);
PoolKernel pool_kernel(PoolPass pass, DType dtype);
WindowKernel window_kernel(WindowPass pass, DType dtype);
// `tiles`: AMX may take it, of floats where `split` (as in ConvNumerics) is not 0.
ConvKernels conv_kernels(DType dtype, bool tiles, int split);
ConvKernels grouped_kernels(DType dtype);   // several groups to a vector; a width of 0: none
ConvKernels winograd_kernels(DType dtype);  // single precision inside; not for doubles

// NHWC vectors may be written past the caches only where every row starts on a
// cache line. Worth it when the data would not stay in the last-level cache.
bool stream_stores(int64_t bytes_touched, int64_t row_bytes, const void* out0, const void* out1);

}  // namespace fused_resnet::cpu
