// How a weight gradient is cut for the kernels of one instruction set.
#pragma once

#include "conv/beside.h"
#include "conv/weight_kernels.h"
#include "fused_resnet/conv.h"

namespace fused_resnet::cpu {

inline constexpr int64_t kSliceBytes = int64_t{1} << 20;  // of all slices' sums: adding the slices must stay cheap
inline constexpr int64_t kSliceBlocks = 3;                // of a slice, at least
inline constexpr int64_t kLeastSlices = 4;                // of which a thread has fewer are not shared out as a whole

struct WeightPlan {
  WeightKernelInfo kernel;
  WeightArgs args;
  int64_t items = 0, finish_items = 0;  // of the two passes
  int64_t slots = 1, scratch_bytes = 0, sums_bytes = 0;
  int64_t unit_blocks = 0;  // blocks of a unit of the data gradient, which both may meet together; 0: they do not fit
};

// Whether every pixel of the output is the product of one of the input.
bool pointwise(const ConvShape& s);
// What the problem says, without any cut.
WeightArgs weight_args(const ConvShape& s);
// Tap by tap, in vectors of one group's channels. Its blocks fit `units` where that leaves enough slices for a team.
WeightPlan direct_weight_plan(const ConvShape& s, const WeightKernelInfo& kernel, const DataUnits& units, int threads);
// 3x3 with 36 multiplications for 144: winograd_weight.h. The decision is the shape's alone; `direct_speed` as in
// winograd_pays().
bool winograd_weight_pays(const WeightArgs& a, double direct_speed);
WeightPlan winograd_weight_plan(const ConvShape& s, const WeightKernelInfo& kernel, int threads);
// Groups that share a vector: grouped_weight.h.
WeightPlan grouped_weight_plan(const ConvShape& s, const WeightKernelInfo& kernel, int threads);

}  // namespace fused_resnet::cpu
