#include "conv/plan.h"

#include <algorithm>
#include <cstdio>

#include "conv/beside.h"
#include "conv/winograd.h"

namespace fused_resnet::cpu {
namespace {

ConvKernels direct_kernels(const ConvShape& s, int64_t channels, const ConvNumerics& numerics) {
  const ConvKernels grouped = grouped_kernels(s.dtype);
  if (groups_share_vectors(s, grouped.traits.width)) return grouped;
  return conv_kernels(s.dtype, fills_tiles(s, channels), conv_split(s, numerics));
}

// Of a direct kernel's multiplications, against single precision's without tiles: pairs, tiles of bfloat16, and tiles
// that make a product of six or three. Tiles as measured on Emerald Rapids with a busy neighbour on the core.
double multiply_speed(const ConvTraits& traits) {
  if (traits.split > 0) return traits.split == 3 ? 1 : 1.8;
  return traits.pair == 1 ? 1 : traits.pair == 2 ? 2 : 8;
}

void name_all_taps(const ConvArgs& a, ConvPackArgs* w) {
  w->rows = a.rows;
  w->cols = a.cols;
  w->fold = a.fold;
  for (int64_t t = 0; t < a.rows; ++t) w->row_index[t] = t;
  for (int64_t u = 0; u < std::max(a.cols, a.fold); ++u) w->col_index[u] = u;
}

}  // namespace

PartPlan plan_part(const ConvShape& s, ConvDirection direction, const ConvNumerics& numerics, int64_t part) {
  const bool backward = direction == ConvDirection::kBackwardData;
  PartPlan plan;
  plan.kernels = direct_kernels(s, backward ? s.k : s.c, numerics);
  const double speed = multiply_speed(plan.traits());
  if (backward) {
    const BackwardDataPart cut = backward_data_geometry(s, plan.traits(), part);
    plan.args = cut.args;
    plan.taps = cut.pack;
  } else {
    plan.args = forward_geometry(s, plan.traits());
    name_all_taps(plan.args, &plan.taps);
  }
  const bool allowed = numerics.allow_winograd && s.dtype != DType::kFloat64;
  if (allowed && winograd_pays(plan.args, speed, direction == ConvDirection::kForwardPacked)) {
    plan.kernels = winograd_kernels(s.dtype);
    cut_winograd(&plan.args, plan.traits());
  }
  return plan;
}

void conv_plan(const ConvShape& s, ConvDirection direction, const ConvNumerics& numerics, char* text, size_t size) {
  const int64_t parts = direction == ConvDirection::kBackwardData ? backward_data_parts(s) : 1;
  constexpr const char* products[] = {"", "", ", three products for one", ", six products for one"};
  size_t used = 0;
  for (int64_t i = 0; i < parts && used < size; ++i) {
    const auto [a, taps, kernels] = plan_part(s, direction, numerics, i);
    const bool tiles = a.unit_tiles > 0;
    used += std::snprintf(
        text + used, size - used, "%s%s and %s%s, %d x %d taps, %lld units of %lld %s, panels of %d%s",
        i == 0 ? "" : "; ", kernels.name, kernels.pack_name, products[a.split], a.rows, std::max(a.cols, a.fold),
        static_cast<long long>(a.units),
        static_cast<long long>(tiles ? a.unit_tiles : a.images * a.block_h * a.block_w), tiles ? "tiles" : "positions",
        a.vectors * kernels.traits.width, a.tiles_first && !tiles ? " that stay in cache" : "");
  }
}

bool conv_is_direct(const ConvShape& s, ConvDirection direction, const ConvNumerics& numerics) {
  const ConvArgs a = plan_part(s, direction, numerics).args;
  return a.unit_tiles == 0 && a.split == 0;
}

bool conv_supported(const ConvShape& s) {
  const bool taps = s.r >= 1 && s.s >= 1 && s.r <= kMaxTaps && s.s <= kMaxTaps;
  const bool groups = s.groups >= 1 && s.c % s.groups == 0 && s.k % s.groups == 0;
  // Pairs of channels must not straddle two groups.
  const bool whole = s.groups == 1 || (s.c / s.groups % 2 == 0 && s.k / s.groups % 2 == 0);
  // What lies between dilated taps, and between strided positions, is packed too: far apart that is slow, and then
  // huge.
  constexpr int64_t kMostReach = 8, kMostStride = 16;
  const auto near = [](int64_t taps, int64_t dilation, int64_t stride) {
    return taps == 1 || ((dilation == 1 || dilation <= kMostReach / (taps - 1)) && stride <= kMostStride);
  };
  return taps && groups && whole && near(s.r, s.dilation_h, s.stride_h) && near(s.s, s.dilation_w, s.stride_w);
}

Status check_problem(const ConvShape& s) {
  if (!conv_supported(s)) return {"conv: the problem has no kernel"};
  if (s.x_numel() == 0 || s.y_numel() == 0) return {"conv: a tensor is empty"};
  return {};
}

DataUnits backward_data_units(const ConvShape& s, const ConvNumerics& numerics) {
  if (backward_data_parts(s) != 1 || s.groups != 1) return {};
  const ConvArgs a = plan_part(s, ConvDirection::kBackwardData, numerics).args;
  const bool one_row = a.a.n == 1 && a.oh == 1 && a.rows == 1 && a.cols == 1 && a.fold == 0;
  return one_row ? DataUnits{a.units, a.block_w} : DataUnits{};
}

}  // namespace fused_resnet::cpu
