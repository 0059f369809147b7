// Batch statistics of one tensor: norm.mean, norm.rstd and norm.var are written.
#pragma once

#include "fused_resnet/batch_norm.h"

namespace fused_resnet::cpu {

int64_t stats_workspace(const Shape& shape);  // bytes
void compute_stats(const void* x, const Shape& shape, const NormParams& norm, void* workspace, const Runner& runner);

}  // namespace fused_resnet::cpu
