// Convolution on the CPU: takes a plan, packs the weight, runs the kernels on the caller's threads, and merges the sums
// of all units in double, in their order.
#include <algorithm>

#include "batch_norm/params.h"
#include "batch_norm/stats.h"
#include "conv/beside.h"
#include "conv/operands.h"
#include "conv/packed.h"
#include "conv/plan.h"
#include "fused_resnet/conv.h"
#include "fused_resnet/workspace.h"
#include "parallel.h"

namespace fused_resnet::cpu {
namespace {

// Below this many multiplications a thread team costs more than it saves.
constexpr int64_t kSerialMacs = 1 << 20;

// A result larger than this is not in a core's cache when it is read again.
int64_t stream_bytes() {
#ifdef FR_STREAM_BYTES  // tests
  return FR_STREAM_BYTES;
#endif
  constexpr int64_t kLeast = 4 << 20;
  return std::max(kLeast, 4 * second_level_cache_bytes());
}

// Channels merged at once.
constexpr int64_t kStatsBlock = 64;

int team(const Runner& runner, int64_t macs) {
  return runner.for_each == nullptr || macs < kSerialMacs ? 1 : std::max(runner.threads, 1);
}

int64_t macs(const ConvArgs& a) {
  return a.a.n * a.oh * a.ow * a.k * std::max<int64_t>(a.rows * a.cols * a.group_c, 1);
}

// The workspace of one pass of `shape`, for any operand and epilogue. `conv` is the largest of its parts.
template <class S>
struct ConvSpace {
  OperandArrays<S> operand;
  NormArrays<S> output;
  S *bias, *slope;
  char* panels;
  uint8_t* unsafe;
  S* partials;
  char* scratch;
  int64_t bytes;
  ConvSpace(Carver carver, int64_t in_channels, int64_t out_channels, int64_t panel_bytes, int64_t pack_items,
            int64_t partials_count, int64_t scratch_bytes)
      : operand(carver, padded_columns(in_channels)),
        output(carver, padded_columns(out_channels)),
        bias(carver.take<S>(padded_columns(out_channels))),
        slope(carver.take<S>(padded_columns(out_channels))),
        panels(carver.take<char>(panel_bytes)),
        unsafe(carver.take<uint8_t>(pack_items)),
        partials(carver.take<S>(partials_count)),
        scratch(carver.take<char>(scratch_bytes)),
        bytes(carver.used()) {}
};

int64_t partials_count(const ConvArgs& a) { return a.units * kConvSums * a.k_padded; }

// Whether whole lines of y are written past the caches, which then need not read them first. Only where the epilogue
// stores them so: whole vectors in the kernel's own type, no bfloat16 that may be denormal.
bool streams(const ConvArgs& a, const ConvTraits& traits, DType dtype) {
  constexpr int64_t kLine = 64;
  const int64_t row = a.k * element_size(dtype), bytes = a.a.n * a.y_h * a.y_w * row;
  const Activation act = a.epilogue == Epilogue::kMaskedSums ? a.z_act : a.act;
  const bool linear = act == Activation::kIdentity || act == Activation::kRelu;
  const bool pairs = traits.pair > 1, tiles = traits.pair > 2;
  const bool plain_skip = a.skip == nullptr || a.epilogue == Epilogue::kStore;
  const bool stored_so = !pairs || (linear && (tiles || a.skip == nullptr));
  return a.unit_tiles == 0 && traits.native && !traits.grouped && stored_so &&
         a.k / a.groups % (2 * traits.width) == 0 && a.skip != a.y && plain_skip && row % kLine == 0 &&
         reinterpret_cast<uintptr_t>(a.y) % kLine == 0 && bytes > stream_bytes();
}

// Every thread gets runs of neighbouring items, and scratch of its own.
void run(ConvArgs& a, const ConvKernels& kernels, char* scratch, const Runner& runner, DType dtype,
         const Beside* beside = nullptr) {
  const int64_t threads = team(runner, macs(a)), panels = panel_count(a, kernels.traits);
  // Few units: their filters are divided. That changes no result, only who computes it.
  if (a.units < 4 * threads && a.units % threads != 0) a.splits = std::min(panels, threads);
  a.stream = streams(a, kernels.traits, dtype);
  a.direct = a.direct && !better_packed(a, kernels.traits);
  const int64_t each = scratch_bytes(a, kernels.traits);
  if (beside == nullptr) {
    share_items(runner, a.units * a.splits, threads, kSerialElements, [&](int64_t worker, int64_t begin, int64_t end) {
      kernels.convolve(a, begin, end, scratch + worker * each);
    });
    return;
  }
  a.splits = 1;
  const bool readable = kernels.traits.native && kernels.traits.split == 0 && !a.direct;
  share_items(runner, beside->slices, threads, kSerialElements, [&](int64_t worker, int64_t begin, int64_t end) {
    char* mine = scratch + worker * each;
    const void* packed = readable ? mine + panels * kPanelSumsBytes : nullptr;
    for (int64_t slice = begin; slice < end; ++slice) {
      for (int64_t unit = beside->first_unit[slice]; unit < beside->first_unit[slice + 1]; ++unit) {
        kernels.convolve(a, unit, unit + 1, mine);
        beside->run(beside->self, worker, slice, {unit, packed, a.c_padded});
      }
    }
  });
}

// Mean and variance from the shifted sums of units of different sizes.
template <class S>
void finish_stats(const ConvArgs& a, const S* partials, const NormParams& stats, const Shape& y, int64_t begin,
                  int64_t end) {
  const double total = static_cast<double>(y.per_channel());
  double mean[kStatsBlock], m2[kStatsBlock];
  for (int64_t first = begin; first < end; first += kStatsBlock) {
    const int64_t count = std::min(kStatsBlock, end - first);
    const auto row = [&](int64_t unit, int sum) { return partials + (unit * kConvSums + sum) * a.k_padded + first; };
    const S* origin = row(0, 0);
    std::fill_n(mean, count, 0.0);
    std::fill_n(m2, count, 0.0);
    for (int64_t u = 0; u < a.units; ++u) {
      const double positions = static_cast<double>(unit_positions(a, u));
      const S *shift = row(u, 0), *sum = row(u, 1);
      for (int64_t i = 0; i < count; ++i) {
        mean[i] +=
            positions * (static_cast<double>(shift[i]) - static_cast<double>(origin[i])) + static_cast<double>(sum[i]);
      }
    }
    for (int64_t i = 0; i < count; ++i) mean[i] = static_cast<double>(origin[i]) + mean[i] / total;
    for (int64_t u = 0; u < a.units; ++u) {
      const double positions = static_cast<double>(unit_positions(a, u)), inverse = 1 / positions;
      const S *shift = row(u, 0), *sum = row(u, 1), *square = row(u, 2);
      for (int64_t i = 0; i < count; ++i) {
        const double d = static_cast<double>(sum[i]);
        const double e = static_cast<double>(shift[i]) + d * inverse - mean[i];
        m2[i] += static_cast<double>(square[i]) - d * d * inverse + positions * e * e;
      }
    }
    for (int64_t i = 0; i < count; ++i) write_stats(stats, y, a.y, first + i, {mean[i], m2[i]});
  }
}

// A pass's workspace as asked for and as used: both come here.
template <class S>
ConvSpace<S> forward_space(Carver carver, const ConvShape& s, const ConvArgs& a, const ConvTraits& traits,
                           int64_t threads, bool packed) {
  return ConvSpace<S>(carver, s.c, s.k, packed ? 0 : panel_bytes(a, traits), packed ? 0 : pack_items(a, traits),
                      partials_count(a), threads * scratch_bytes(a, traits));
}

template <class S>
void forward(const ConvForward& p) {
  const ConvShape& s = p.shape;
  const bool packed = p.packed != nullptr;
  PartPlan plan = plan_forward(s, p.numerics, packed);
  ConvArgs& a = plan.args;
  ConvPackArgs& w = plan.taps;
  const ConvKernels& kernels = plan.kernels;
  ConvSpace<S> space = forward_space<S>(Carver(p.workspace), s, a, kernels.traits, team(p.runner, macs(a)), packed);
  space.operand.fill_input(p.x, s, &a.a);
  settle(&a, kernels.traits);

  char* panels = space.panels;
  uint8_t* unsafe = space.unsafe;
  if (packed) {
    const PackedSpace there(Carver(const_cast<void*>(p.packed)), a, kernels.traits);
    panels = there.panels;
    unsafe = there.unsafe;
  }
  point_at_weight(p.weight, s, /*transposed=*/false, a, panels, unsafe, &w);
  if (!packed) pack_weight(kernels, p.runner, a, w);
  a.raw = &w;
  a.weight = panels;

  a.y = p.y;
  a.skip = p.skip;
  a.act = p.act.kind;
  if (p.act.kind != Activation::kIdentity) {
    fill_slope(space.slope, p.act, s.k, padded_columns(s.k));
    a.act_slope = space.slope;
  }
  if (p.bias != nullptr) a.bias = fill_columns(space.bias, static_cast<const S*>(p.bias), s.k);
  a.epilogue = p.stats.batch_stats ? Epilogue::kStats : Epilogue::kStore;
  a.partials = space.partials;
  run(a, kernels, space.scratch, p.runner, s.dtype);
  if (p.stats.batch_stats) {
    const Shape y{s.n, s.k, s.out_h() * s.out_w(), s.dtype, Layout::kNHWC};
    for_chunks(p.runner, s.k, partials_count(a) * 4,
               [&](int64_t begin, int64_t end) { finish_stats<S>(a, space.partials, p.stats, y, begin, end); });
  }
}

template <class S>
ConvSpace<S> backward_data_space(Carver carver, const ConvShape& s, const ConvNumerics& numerics, int64_t threads) {
  int64_t panels = 0, items = 0, partials = 0, scratch = 0;
  for (int64_t i = 0; i < backward_data_parts(s); ++i) {
    const auto [a, taps, kernels] = plan_part(s, ConvDirection::kBackwardData, numerics, i);
    const ConvTraits& traits = kernels.traits;
    panels = std::max(panels, panel_bytes(a, traits));
    items = std::max(items, pack_items(a, traits));
    scratch = std::max(scratch, scratch_bytes(a, traits));
    partials += partials_count(a);
  }
  return ConvSpace<S>(carver, s.k, s.c, panels, items, partials, threads * scratch);
}

template <class S>
void backward_data(const ConvBackwardData& p, const Beside* beside) {
  const ConvShape& s = p.shape;
  ConvSpace<S> space = backward_data_space<S>(Carver(p.workspace), s, p.numerics, team(p.runner, s.macs()));
  ConvOperand operand;
  space.operand.fill_gradient(p.dy, s, &operand);
  const int64_t columns = padded_columns(s.c);
  if (p.x.has_norm) {
    space.output.fill(p.x.norm, s.c, columns);
    fill_slope(space.slope, p.x.act, s.c, columns);
  }

  int64_t units = 0, k_padded = 0;
  for (int64_t i = 0; i < backward_data_parts(s); ++i) {
    auto [a, w, kernels] = plan_part(s, ConvDirection::kBackwardData, p.numerics, i);
    // The operand's extent stands in the geometry, which may have flattened it.
    const int64_t n = a.a.n, h = a.a.h, width = a.a.w;
    a.a = operand;
    a.a.n = n;
    a.a.h = h;
    a.a.w = width;
    settle(&a, kernels.traits);
    point_at_weight(p.weight, s, /*transposed=*/true, a, space.panels, space.unsafe, &w);
    pack_weight(kernels, p.runner, a, w);
    a.raw = &w;
    a.weight = space.panels;

    a.y = p.dx;
    a.skip = p.skip;
    a.skip_mask = p.skip_mask;
    k_padded = a.k_padded;
    a.partials = space.partials + units * kConvSums * k_padded;
    if (p.x.has_norm) {
      a.epilogue = Epilogue::kMaskedSums;
      a.z = p.x.data;
      a.z_mean = space.output.mean;
      a.z_scale = space.output.scale;
      a.z_bias = space.output.bias;
      a.z_act = p.x.act.kind;
      a.z_slope = space.slope;
    }
    run(a, kernels, space.scratch, p.runner, s.dtype, beside);
    units += a.units;
  }
  if (!p.x.has_norm) return;
  for_chunks(p.runner, s.c, units * s.c * 4, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double sum_g = 0, sum_gx = 0;
      for (int64_t u = 0; u < units; ++u) {
        const S* sums = space.partials + u * kConvSums * k_padded + c;
        sum_g += static_cast<double>(sums[k_padded]);
        sum_gx += static_cast<double>(sums[2 * k_padded]);
      }
      const double rstd = static_cast<double>(static_cast<const S*>(p.x.norm.rstd)[c]);
      if (p.dweight != nullptr) static_cast<S*>(p.dweight)[c] = static_cast<S>(sum_gx * rstd);
      if (p.dbias != nullptr) static_cast<S*>(p.dbias)[c] = static_cast<S>(sum_g);
    }
  });
}

}  // namespace

int64_t conv_forward_workspace(const ConvShape& s, const ConvNumerics& numerics, int threads, bool packed) {
  const PartPlan plan = plan_forward(s, numerics, packed);
  const Carver count(nullptr);
  return s.dtype == DType::kFloat64 ? forward_space<double>(count, s, plan.args, plan.traits(), threads, packed).bytes
                                    : forward_space<float>(count, s, plan.args, plan.traits(), threads, packed).bytes;
}

int64_t conv_backward_data_workspace(const ConvShape& s, const ConvNumerics& numerics, int threads) {
  const Carver count(nullptr);
  return s.dtype == DType::kFloat64 ? backward_data_space<double>(count, s, numerics, threads).bytes
                                    : backward_data_space<float>(count, s, numerics, threads).bytes;
}

Status conv_forward(const ConvForward& p) {
  const Status status = check_problem(p.shape);
  if (!status.ok()) return status;
  if (p.stats.batch_stats && p.act.kind != Activation::kIdentity)
    return {"conv: statistics are taken before an activation"};
  p.shape.dtype == DType::kFloat64 ? forward<double>(p) : forward<float>(p);
  return {};
}

Status conv_backward_data(const ConvBackwardData& p) {
  const Status status = check_problem(p.shape);
  if (!status.ok()) return status;
  p.shape.dtype == DType::kFloat64 ? backward_data<double>(p, nullptr) : backward_data<float>(p, nullptr);
  return {};
}

Status backward_data_beside(const ConvBackwardData& p, const Beside& beside) {
  const Status status = check_problem(p.shape);
  if (!status.ok()) return status;
  p.shape.dtype == DType::kFloat64 ? backward_data<double>(p, &beside) : backward_data<float>(p, &beside);
  return {};
}

}  // namespace fused_resnet::cpu
