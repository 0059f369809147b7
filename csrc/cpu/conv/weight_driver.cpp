// The weight gradient of a convolution: takes a plan, runs its kernels on the caller's threads, and has the slices'
// sums added. Alone, or beside the data gradient.
#include <algorithm>
#include <optional>

#include "conv/beside.h"
#include "conv/cuts.h"
#include "conv/geometry.h"
#include "conv/operands.h"
#include "conv/weight_plan.h"
#include "fused_resnet/conv.h"
#include "parallel.h"

namespace fused_resnet::cpu {
namespace {
#include "conv/split_layout.h"

// Floats in parts are multiplied where tiles are mostly full.
constexpr int64_t kLeastSplitChannels = 32;

// The data gradient's units that blocks may fit.
DataUnits data_units(const ConvShape& s, const ConvNumerics& numerics) {
  return pointwise(s) && s.groups == 1 ? backward_data_units(s, numerics) : DataUnits{};
}

WeightPlan weight_plan(const ConvShape& s, const DataUnits& units, int threads) {
  const WeightKernelInfo grouped = grouped_weight_kernel(s.dtype);
  if (groups_share_vectors(s, grouped.traits.width)) return grouped_weight_plan(s, grouped, threads);
  return direct_weight_plan(s, conv_weight_kernel(s.dtype, s.groups), units, threads);
}

// The kernel for floats in parts, or none.
WeightKernelInfo split_kernel(const ConvShape& s, const ConvNumerics& numerics) {
  const bool full = s.groups == 1 && std::min(s.c, s.k) >= kLeastSplitChannels;
  return s.dtype == DType::kFloat32 && full ? split_weight_kernel(weight_split(s, numerics)) : WeightKernelInfo{};
}

// Of the direct kernel's multiplications, against single precision's without tiles. Three products are 2 times as fast
// and pack more; Winograd's sums are few where there are tiles to choose it for.
double multiply_speed(const WeightTraits& traits) {
  if (traits.split > 0) return traits.split == 3 ? 1 : 1.4;
  return traits.pair == 1 ? 1 : traits.group == 1 ? 2 : 8;
}

bool takes_winograd(const ConvShape& s, const ConvNumerics& numerics) {
  if (!numerics.allow_winograd || s.dtype == DType::kFloat64) return false;
  const WeightKernelInfo split = split_kernel(s, numerics);
  const WeightKernelInfo direct = split.kernel != nullptr ? split : conv_weight_kernel(s.dtype, s.groups);
  return winograd_weight_pays(weight_args(s), multiply_speed(direct.traits));
}

template <class S>
struct Space {
  OperandArrays<S> input, gradient;
  double* bias_sums;
  uint8_t* unsafe;
  char *sums, *scratch;
  int64_t bytes;
  Space(Carver carver, const ConvShape& s, const WeightPlan& plan)
      : input(carver, padded_columns(s.c)),
        gradient(carver, padded_columns(s.k)),
        bias_sums(carver.take<double>(plan.args.slices * s.k)),
        unsafe(carver.take<uint8_t>(2 * plan.items)),
        sums(carver.take<char>(plan.sums_bytes)),
        scratch(carver.take<char>(plan.slots * plan.scratch_bytes)),
        bytes(carver.used()) {}
};

// Whether what the kernel saw of its operands lets it have the last word. Smallnesses are of all items together: how
// the work was shared out must not matter.
bool trusted(const WeightPlan& plan) {
  const WeightArgs& a = plan.args;
  int small_a = 0, small_dz = 0;
  for (int64_t i = 0; i < plan.items; ++i) {
    if (a.unit_tiles > 0 && a.unsafe[i] != 0) return false;
    if (a.split == 0) continue;
    small_a = std::max<int>(small_a, a.unsafe[2 * i]);
    small_dz = std::max<int>(small_dz, a.unsafe[2 * i + 1]);
  }
  return small_a + small_dz <= kMostSmallness;
}

// A weight gradient from its operands to the parameter's gradient.
template <class S>
class WeightRun {
 public:
  WeightRun(const ConvBackwardWeight& p, const WeightPlan& plan)
      : p_(p), plan_(plan), space_(Carver(p.workspace), p.shape, plan) {
    WeightArgs& a = plan_.args;
    space_.input.fill_input(p.x, p.shape, &a.a);
    space_.gradient.fill_gradient(p.dy, p.shape, &a.dz);
    a.sums = space_.sums;
    a.bias_sums = p.dbias == nullptr ? nullptr : space_.bias_sums;
    a.unsafe = space_.unsafe;
    a.dweight = p.dweight;
    a.float_dweight = p.layout.is_float;
    a.out_k = p.layout.stride_k;
    a.out_c = p.layout.stride_c;
    a.out_r = p.layout.stride_r;
    a.out_s = p.layout.stride_s;
  }

  void accumulate() { share(plan_.items, p_.shape.macs()); }
  // The blocks of one unit of the data gradient, of a plan whose items are slices.
  void accumulate(int64_t slot, int64_t slice, const DataUnit& unit) const {
    WeightArgs a = plan_.args;
    a.first_block = unit.index * plan_.unit_blocks;
    a.last_block = a.first_block + plan_.unit_blocks;
    if (unit.packed != nullptr && a.bias_sums == nullptr) {
      read_packed(unit, &a.dz);
      a.dz_ahead = false;
    }
    plan_.kernel.kernel(a, slice, slice + 1, scratch(slot));
  }

  // Returns whether it is done: not where the kernel met values that are not for it.
  bool finish() {
    if (!trusted(plan_)) return false;
    plan_.args.pass = WeightPass::kFinish;
    share(plan_.finish_items, plan_.sums_bytes / 4);
    const int64_t filters = p_.shape.k;
    for (int64_t k = 0; p_.dbias != nullptr && k < filters; ++k) {
      double sum = 0;
      for (int64_t slice = 0; slice < plan_.args.slices; ++slice) sum += space_.bias_sums[slice * filters + k];
      static_cast<S*>(p_.dbias)[k] = static_cast<S>(sum);
    }
    return true;
  }

 private:
  // dz is there already. A bias is summed before it is rounded.
  void read_packed(const DataUnit& unit, ConvOperand* dz) const {
    const int64_t first = unit.index * plan_.unit_blocks * plan_.args.block_w;
    const int64_t before = first * unit.channels * element_size(p_.shape.dtype);
    dz->kind = OperandKind::kPlain;
    dz->mask = nullptr;
    dz->data = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(unit.packed) - static_cast<uintptr_t>(before));
    dz->c = unit.channels;
  }
  char* scratch(int64_t slot) const { return space_.scratch + slot * plan_.scratch_bytes; }
  // Every slot has its scratch, and takes items of which none has been taken.
  void share(int64_t items, int64_t work) {
    share_items(p_.runner, items, plan_.slots, work, [&](int64_t slot, int64_t begin, int64_t end) {
      plan_.kernel.kernel(plan_.args, begin, end, scratch(slot));
    });
  }

  const ConvBackwardWeight& p_;
  WeightPlan plan_;
  Space<S> space_;
};

template <class S>
bool run_plan(const ConvBackwardWeight& p, const WeightPlan& plan) {
  WeightRun<S> run(p, plan);
  run.accumulate();
  return run.finish();
}

// The plans of a problem: the one to try, if there is a better one than that which takes any values.
struct WeightPlans {
  std::optional<WeightPlan> first;
  WeightPlan any;
  WeightPlans(const ConvShape& s, const ConvNumerics& numerics, int threads)
      : any(weight_plan(s, data_units(s, numerics), threads)) {
    // What is no number for Winograd is none to be split either.
    const WeightKernelInfo split = split_kernel(s, numerics);
    if (takes_winograd(s, numerics)) {
      first = winograd_weight_plan(s, winograd_weight_kernel(s.dtype), threads);
    } else if (split.kernel != nullptr) {
      first = direct_weight_plan(s, split, data_units(s, numerics), threads);
    }
  }
};

template <class S>
void backward_weight(const ConvBackwardWeight& p) {
  const WeightPlans plans(p.shape, p.numerics, p.runner.threads);
  if (plans.first.has_value() && run_plan<S>(p, *plans.first)) return;
  run_plan<S>(p, plans.any);
}

// The plan of a weight gradient that runs beside the data gradient, a slice of the pixels of both at a time. None where
// that cannot be, or would leave threads without slices.
std::optional<WeightPlan> plan_beside(const ConvShape& s, const ConvNumerics& numerics, int threads) {
  if (!pointwise(s) || s.groups != 1) return std::nullopt;  // before plans are made, at every call
  const int64_t team = std::max(threads, 1);
  const WeightPlans plans(s, numerics, /*threads=*/1);
  WeightPlan plan = plans.first.has_value() ? *plans.first : plans.any;
  const int64_t slices = plan.args.slices;
  if (plan.unit_blocks == 0 || plan.items != slices || slices < kLeastSlices * team) return std::nullopt;
  plan.slots = team;
  return plan;
}

bool same_means(const ConvBackwardData& data, const ConvBackwardWeight& weight) {
  const ConvNumerics &a = data.numerics, &b = weight.numerics;
  return data.runner.threads == weight.runner.threads && data.runner.for_each == weight.runner.for_each &&
         a.allow_winograd == b.allow_winograd && a.split == b.split && a.split_where_faster == b.split_where_faster;
}

template <class S>
Status backward(const ConvBackwardData& data, const ConvBackwardWeight& weight) {
  if (!same_means(data, weight)) return {"conv: both gradients need the same runner and the same numerics"};
  const ConvShape& s = weight.shape;
  const std::optional<WeightPlan> plan = plan_beside(s, weight.numerics, weight.runner.threads);
  if (!plan.has_value()) {
    const Status status = conv_backward_data(data);
    return status.ok() ? conv_backward_weight(weight) : status;
  }
  const WeightArgs& a = plan->args;
  int64_t first_unit[kMaxSlices + 1];
  for (int64_t i = 0; i <= a.slices; ++i) first_unit[i] = divide_up(a.slice_begin[i], plan->unit_blocks);
  WeightRun<S> run(weight, *plan);
  const auto beside = [](const void* self, int64_t worker, int64_t slice, const DataUnit& unit) {
    static_cast<const WeightRun<S>*>(self)->accumulate(worker, slice, unit);
  };
  const Status status = backward_data_beside(data, {a.slices, first_unit, &run, beside});
  if (!status.ok()) return status;
  if (!run.finish()) run_plan<S>(weight, WeightPlans(s, weight.numerics, weight.runner.threads).any);
  return {};
}

template <class S>
int64_t weight_workspace(const ConvShape& s, const ConvNumerics& numerics, int threads) {
  const Carver count(nullptr);
  const WeightPlans plans(s, numerics, threads);
  const std::optional<WeightPlan> beside = plan_beside(s, numerics, threads);
  int64_t most = Space<S>(count, s, plans.any).bytes;
  for (const auto& plan : {plans.first, beside}) {
    if (plan.has_value()) most = std::max(most, Space<S>(count, s, *plan).bytes);
  }
  return most;
}

}  // namespace

const char* conv_weight_plan(const ConvShape& s, const ConvNumerics& numerics) {
  if (takes_winograd(s, numerics)) return winograd_weight_kernel(s.dtype).name;
  const WeightKernelInfo split = split_kernel(s, numerics);
  return split.kernel != nullptr ? split.name : weight_plan(s, {}, 1).kernel.name;
}

int64_t conv_backward_weight_workspace(const ConvShape& s, const ConvNumerics& numerics, int threads) {
  return s.dtype == DType::kFloat64 ? weight_workspace<double>(s, numerics, threads)
                                    : weight_workspace<float>(s, numerics, threads);
}

Status conv_backward_weight(const ConvBackwardWeight& p) {
  p.shape.dtype == DType::kFloat64 ? backward_weight<double>(p) : backward_weight<float>(p);
  return {};
}

bool conv_runs_together(const ConvShape& s, const ConvNumerics& numerics, int threads) {
  return plan_beside(s, numerics, threads).has_value();
}

Status conv_backward(const ConvBackwardData& data, const ConvBackwardWeight& weight) {
  return weight.shape.dtype == DType::kFloat64 ? backward<double>(data, weight) : backward<float>(data, weight);
}

}  // namespace fused_resnet::cpu
