// Batch statistics of one tensor: norm.mean, norm.rstd and norm.var are written.
#pragma once

#include "fused_resnet/batch_norm.h"

namespace fused_resnet::cpu {

// Of one channel: mean, and the sum of squared differences from it.
struct Moments {
  double mean, m2;
};

int64_t stats_workspace(const Shape& shape);  // bytes
void compute_stats(const void* x, const Shape& shape, const NormParams& norm, void* workspace, const Runner& runner);

// Writes channel c of `norm`. Where `m` is not finite it is computed again from x, all in double: single-precision sums
// overflow before the statistics do.
void write_stats(const NormParams& norm, const Shape& shape, const void* x, int64_t c, Moments m);

}  // namespace fused_resnet::cpu
