#include "conv/packed.h"

#include <algorithm>
#include <cstdio>

#include "conv/plan.h"
#include "parallel.h"

namespace fused_resnet::cpu {
namespace {
#include "conv/split_layout.h"
}  // namespace

void point_at_weight(const ConvWeight& weight, const ConvShape& s, bool transposed, const ConvArgs& a, char* panels,
                     uint8_t* unsafe, ConvPackArgs* w) {
  const int64_t group_k = s.k / s.groups, group_c = s.c / s.groups;
  w->weight = weight.data;
  w->floats = weight.is_float;
  w->stride_out = transposed ? weight.stride_c : weight.stride_k;
  w->stride_in = transposed ? weight.stride_k : weight.stride_c;
  w->stride_row = weight.stride_r;
  w->stride_col = weight.stride_s;
  w->group_stride = group_k * weight.stride_k;
  w->groups = s.groups;
  w->outs = transposed ? group_c : group_k;
  w->ins = transposed ? group_k : group_c;
  w->vectors = a.vectors;
  w->split = a.split;
  w->panels = panels;
  w->unsafe = unsafe;
}

void pack_weight(const ConvKernels& kernels, const Runner& runner, const ConvArgs& a, const ConvPackArgs& w) {
  for_chunks(runner, pack_items(a, kernels.traits), w.groups * w.outs * w.ins * w.rows * w.cols,
             [&](int64_t begin, int64_t end) { kernels.pack(w, begin, end); });
}

void conv_packed_format(const ConvShape& s, const ConvNumerics& numerics, char* text, size_t size) {
  const PartPlan plan = plan_forward(s, numerics, /*packed=*/true);
  std::snprintf(text, size, "%s, %d parts", plan.kernels.pack_name, plan.args.split);
}

int64_t conv_packed_bytes(const ConvShape& s, const ConvNumerics& numerics) {
  const PartPlan plan = plan_forward(s, numerics, /*packed=*/true);
  return PackedSpace(Carver(nullptr), plan.args, plan.traits()).bytes;
}

// What ConvArgs::raw is for. Three parts are all of a float that may be split.
bool conv_reads_weight(const ConvShape& s, const ConvNumerics& numerics, const void* packed) {
  const PartPlan plan = plan_forward(s, numerics, /*packed=*/true);
  const ConvArgs& a = plan.args;
  if (a.unit_tiles > 0 || a.split == 2) return true;
  if (a.split == 0) return false;
  const PackedSpace there(Carver(const_cast<void*>(packed)), a, plan.traits());
  return std::any_of(there.unsafe, there.unsafe + pack_items(a, plan.traits()),
                     [](uint8_t smallness) { return smallness > kMostSmallness; });
}

Status conv_pack(const ConvPack& p) {
  const Status status = check_problem(p.shape);
  if (!status.ok()) return status;
  PartPlan plan = plan_forward(p.shape, p.numerics, /*packed=*/true);
  const ConvArgs& a = plan.args;
  const PackedSpace space(Carver(p.packed), a, plan.traits());
  point_at_weight(p.weight, p.shape, /*transposed=*/false, a, space.panels, space.unsafe, &plan.taps);
  pack_weight(plan.kernels, p.runner, a, plan.taps);
  return {};
}

}  // namespace fused_resnet::cpu
