// From (pass, dtype) to the kernel that runs on this machine now.
#pragma once

#include "batch_norm/kernels.h"
#include "isa.h"
#include "pool/kernels.h"

namespace fused_resnet::cpu {

enum class BnPass : uint8_t { stats, apply, backward_reduce, backward_apply };
enum class PoolPass : uint8_t { forward, backward_reduce, backward_apply };

BnKernel bn_kernel(BnPass pass, DType dtype);
PoolKernel pool_kernel(PoolPass pass, DType dtype);

// NHWC vectors may be written past the caches only where every row starts on a
// cache line. Worth it when the data would not stay in the last-level cache.
bool stream_stores(int64_t bytes_touched, int64_t row_bytes, const void* out0, const void* out1);

}  // namespace fused_resnet::cpu
