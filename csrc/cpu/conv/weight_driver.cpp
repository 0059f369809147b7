// The weight gradient of a convolution: cuts the output into blocks and slices, runs the kernels on the caller's
// threads, and has the slices' sums added. What is added in which order depends on the shape alone.
#include <algorithm>
#include <optional>

#include "batch_norm/params.h"
#include "conv/beside.h"
#include "conv/geometry.h"
#include "conv/weight_plan.h"
#include "fused_resnet/conv.h"
#include "parallel.h"

namespace fused_resnet::cpu {
namespace {
#include "conv/split_layout.h"

// Steps of a block: a packed tile of `a` stays in the first-level cache while it meets all filters.
constexpr int64_t kBlockSteps = 224;
// Where they are cut to fit the data gradient's units, at most.
constexpr int64_t kMostBlockSteps = 256;
// Slices of which a thread has fewer are not shared out as a whole.
constexpr int64_t kLeastSlices = 4;
// Bytes of the packed operands of a chunk, each; for tiles, which are so fast that packing an operand again costs more.
constexpr int64_t kChunkBytes = int64_t{640} << 10, kTileChunkBytes = int64_t{1} << 20;
// Of all slices' sums of a 1x1 convolution, for tiles of bfloat16: more slices, so that threads share pixels, and
// neither packs what the other has packed. No slice's sums may take the place of the operands in the second-level
// cache, unless dz, which takes the longest to pack, is the larger operand.
constexpr int64_t kTileSliceBytes = int64_t{4} << 20, kMostSliceBytes = int64_t{512} << 10,
                  kMostWideBytes = int64_t{1} << 20;
// Floats in parts are multiplied where tiles are mostly full.
constexpr int64_t kLeastSplitChannels = 32;
// Few channels, so few that taps are folded into them.
constexpr int64_t kFoldRow = 64, kFoldAll = 512;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t at_least(int64_t a, int64_t low) { return a < low ? low : a; }
int64_t at_most(int64_t a, int64_t high) { return a > high ? high : a; }
// The size of equal parts of `count` that are no larger than `limit`.
int64_t even_part(int64_t count, int64_t limit) { return ceil_div(count, ceil_div(count, at_least(limit, 1))); }

bool pointwise(const ConvShape& s) {
  return s.r == 1 && s.s == 1 && s.stride_h == 1 && s.stride_w == 1 && s.pad_h == 0 && s.pad_w == 0;
}

// The data gradient's units that blocks may fit.
DataUnits data_units(const ConvShape& s, const ConvNumerics& numerics) {
  return pointwise(s) && s.groups == 1 ? backward_data_units(s, numerics) : DataUnits{};
}

struct Plan : WeightPlan {
  Plan(const ConvShape& s, const WeightKernelInfo& which, const DataUnits& units, int threads) {
    kernel = which;
    args = weight_args(s);
    args.split = traits().split;
    set_tiles();
    set_blocks();
    set_slices(s, units.count > 0);
    fit_blocks(units);
    set_parts(static_cast<int>(at_least(threads, 1)));
    set_scratch(s);
    finish_items = args.groups * args.group_k;
  }

 private:
  const WeightTraits& traits() const { return kernel.traits; }
  int64_t lanes() const { return int64_t{traits().width} * traits().vectors; }
  bool tiles() const { return traits().group > 1; }
  // Of a block: its parts take as much of the caches as whole values would.
  int64_t block_steps() const {
    return traits().split == 0 ? kBlockSteps : round_up(kBlockSteps / traits().split, traits().group);
  }

  void set_tiles() {
    WeightArgs& a = args;
    const int64_t row = a.cols * a.group_c;
    a.fold = a.groups == 1 && a.dilation_w == 1 && a.group_c < traits().width && a.rows * a.cols > 1 &&
             row <= kFoldRow && row * a.rows <= kFoldAll;
    a.taps = a.fold ? 1 : a.rows * a.cols;
    a.tile_c = a.fold ? row * a.rows : a.group_c;
    a.k_tiles = ceil_div(a.group_k, traits().filters);
    a.c_tiles = ceil_div(a.tile_c, lanes());
    a.a_step = lanes() * traits().parts();
    if (a.fold) {
      const int64_t reach = (a.rows - 1) * row + round_up(row, traits().width);
      a.a_step = round_up(at_least(reach, a.c_tiles * lanes()), 16);
      if (a.a_step / 16 % 2 == 0) a.a_step += 16;  // an odd number of cache lines meets all sets of a cache
    }
  }

  void set_blocks() {
    WeightArgs& a = args;
    const ConvOperand& y = a.dz;
    const int64_t pair = traits().pair, pixels = block_steps() * pair;
    // Rows of an odd width would end in half a step: an image too many may cost less.
    a.pair_images =
        pair == 2 && !a.fold && y.w % 2 != 0 && y.w <= block_steps() && y.n > 1 && (y.n % 2 == 0 || y.n > y.w);
    const int64_t together = a.pair_images ? pair : 1;
    a.block_w = y.w <= pixels / together ? y.w : round_up(even_part(y.w, pixels), pair * traits().group);
    a.block_h = a.block_w < y.w ? 1 : even_part(y.h, pixels / together / y.w);
    const int64_t image = y.h * y.w;
    a.block_n = a.block_h < y.h || a.block_w < y.w ? together : round_up(even_part(y.n, pixels / image), together);
    a.blocks_n = ceil_div(y.n, a.block_n);
    a.blocks_h = ceil_div(y.h, a.block_h);
    a.blocks_w = ceil_div(y.w, a.block_w);
  }

  void set_slices(const ConvShape& s, bool plain) {
    const int64_t blocks = args.blocks_n * args.blocks_h * args.blocks_w;
    const int64_t bytes = args.groups * args.taps * args.c_tiles * args.group_k * lanes() * stat_size(s.dtype);
    const bool many = tiles() && traits().split == 0 && plain &&
                      bytes <= (args.group_k > args.group_c ? kMostWideBytes : kMostSliceBytes);
    const int64_t most = many ? kTileSliceBytes : kSliceBytes;
    const int64_t slices = at_most(at_most(blocks / kSliceBlocks, most / bytes), kMaxSlices);
    args.slices = at_least(slices, 1);
    sums_bytes = args.slices * bytes;
    cut_slices(blocks, 1);
  }

  // Every slice begins with the first of `together` blocks.
  void cut_slices(int64_t blocks, int64_t together) {
    const int64_t runs = ceil_div(blocks, together);
    for (int64_t i = 0; i <= args.slices; ++i) {
      args.slice_begin[i] = at_most(runs * i / args.slices * together, blocks);
    }
  }

  // Where there are slices for threads to share, a unit of the data gradient is whole blocks.
  void fit_blocks(const DataUnits& units) {
    WeightArgs& a = args;
    const int64_t slices = at_most(a.slices, units.count);
    if (slices < kLeastSlices) return;
    const int64_t pair = traits().pair, most = block_steps() * kMostBlockSteps / kBlockSteps * pair;
    const int64_t fewest = ceil_div(units.pixels, most);
    int64_t each = fewest;
    while (units.pixels % (each * pair) != 0) {
      if (++each > 2 * fewest) return;
    }
    unit_blocks = each;
    a.slices = slices;
    a.block_w = units.pixels / each;
    a.blocks_w = ceil_div(a.dz.w, a.block_w);
    cut_slices(a.blocks_w, each);
  }

  // Enough items that no thread has much more to do than another.
  void set_parts(int threads) {
    WeightArgs& a = args;
    const int64_t outer = a.slices * a.groups, limit = a.k_tiles * (a.fold ? 1 : a.c_tiles);
    int64_t parts = 1;
    for (; parts < limit && parts * outer < int64_t{8} * threads; ++parts) {
      const int64_t rounds = ceil_div(outer * parts, threads);
      if (outer * parts * 10 >= rounds * threads * 9) break;
    }
    // Every part of one operand packs the other anew, and `a` is packed once for every tap column.
    const bool filters_first = a.fold || a.taps > 1 || a.group_k >= a.group_c;
    if (filters_first) {
      a.k_parts = at_most(parts, a.k_tiles);
      a.c_parts = at_most(ceil_div(parts, a.k_parts), a.fold ? 1 : a.c_tiles);
    } else {
      a.c_parts = at_most(parts, a.c_tiles);
      a.k_parts = at_most(ceil_div(parts, a.c_parts), a.k_tiles);
    }
    items = outer * a.k_parts * a.c_parts;
    slots = at_most(threads, items);
  }

  void set_scratch(const ConvShape& s) {
    WeightArgs& a = args;
    // A unit with all of its parts.
    const int64_t pair = traits().pair, unit = traits().unit_size * traits().parts(), stat = stat_size(s.dtype);
    const int64_t runs = a.pair_images ? ceil_div(a.block_n, pair) : a.block_n;
    const int64_t row_steps = a.pair_images ? a.block_w : ceil_div(a.block_w, pair);
    const int64_t steps = runs * a.block_h * row_steps;
    const int64_t dz_steps = round_up(steps, traits().group);

    const int64_t k_tile = (dz_steps * traits().filters + kTileSlack) * unit;
    // Room for a chunk does not depend on the number of parts, and so on the threads.
    const int64_t chunk_bytes = tiles() ? kTileChunkBytes : kChunkBytes;
    const int64_t most_k = at_most(a.k_tiles, at_least(chunk_bytes / k_tile, 1));
    a.chunk_k = even_part(ceil_div(a.k_tiles, a.k_parts), most_k);
    const int64_t chunk_filters = most_k * traits().filters + 32;

    int64_t c_bytes = steps * a.a_step * traits().unit_size, stage = 0;
    if (a.fold) {
      a.chunk_c = a.c_tiles;
      const int64_t span = (a.block_h - 1) * a.stride_h + (a.rows - 1) * a.dilation_h + 1;
      stage = (span * ((row_steps * pair - 1) * a.stride_w + a.cols) * a.group_c + 32) * stat;
    } else {
      const int64_t c_tile = a.cols * runs * packed_rows() * row_steps * lanes() * unit;
      const int64_t most_c = at_most(a.c_tiles, at_least(chunk_bytes / c_tile, 1));
      a.chunk_c = even_part(ceil_div(a.c_tiles, a.c_parts), most_c);
      c_bytes = most_c * c_tile;
      if (a.cols > 1) {
        const int64_t columns = (a.block_w - 1) * a.stride_w + (a.cols - 1) * a.dilation_w + 1;
        stage = (a.pair_images ? 2 : 1) * columns * most_c * lanes() * stat;
      }
    }
    Carver scratch(nullptr);
    auto take = [&](int64_t bytes) {
      const int64_t at = scratch.used();
      scratch.take<char>(bytes + 64);
      return at;
    };
    a.dz_at = take(most_k * k_tile);
    a.a_at = take(c_bytes);
    a.stage_at = take(at_least(stage, kStageSteps * (chunk_filters + 16) * unit));
    a.bias_at = take(chunk_filters * stat);
    scratch_bytes = at_least(scratch.used(), round_up(a.taps * lanes() * 8, 64));
  }

  // Input rows that a block packs: those of one remainder of the stride stand together.
  int64_t packed_rows() const {
    int64_t rows = 0;
    for (int64_t remainder = 0; remainder < args.stride_h; ++remainder) {
      int64_t reach = -1;
      for (int64_t r = 0; r < args.rows; ++r) {
        if (r * args.dilation_h % args.stride_h == remainder) reach = r * args.dilation_h / args.stride_h;
      }
      if (reach >= 0) rows += args.block_h + reach;
    }
    return rows;
  }
};

WeightPlan weight_plan(const ConvShape& s, const DataUnits& units, int threads) {
  const WeightKernelInfo grouped = grouped_weight_kernel(s.dtype);
  if (groups_share_vectors(s, grouped.traits.width)) return grouped_weight_plan(s, grouped, threads);
  return Plan(s, conv_weight_kernel(s.dtype, s.groups), units, threads);
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

// The kernels may read a vector from any channel on.
int64_t operand_channels(int64_t c) { return padded_channels(c) + kChannelPad; }

template <class S>
struct Space {
  NormArrays<S> input, output;
  S* slope;
  GradientArrays<S> gradient;
  double* bias_sums;
  uint8_t* unsafe;
  char *sums, *scratch;
  int64_t bytes;
  Space(Carver carver, const ConvShape& s, const WeightPlan& plan)
      : input(carver, operand_channels(s.c)),
        output(carver, operand_channels(s.k)),
        slope(carver.take<S>(operand_channels(s.c))),
        gradient(carver, operand_channels(s.k)),
        bias_sums(carver.take<double>(plan.args.slices * s.k)),
        unsafe(carver.take<uint8_t>(2 * plan.items)),
        sums(carver.take<char>(plan.sums_bytes)),
        scratch(carver.take<char>(plan.slots * plan.scratch_bytes)),
        bytes(carver.used()) {}
};

template <class S>
void set_input(ConvOperand& a, Space<S>& space, const ConvInput& x, int64_t c) {
  a.data = x.data;
  if (!x.has_norm) return;
  a.kind = OperandKind::kNorm;
  a.act = x.act.kind;
  space.input.fill(x.norm, c, operand_channels(c));
  fill_slope(space.slope, x.act, c, operand_channels(c));
  a.mean = space.input.mean;
  a.scale = space.input.scale;
  a.bias = space.input.bias;
  a.slope = space.slope;
}

template <class S>
void set_gradient(ConvOperand& dz, Space<S>& space, const ConvGradient& dy, int64_t k, double count) {
  dz.data = dy.data;
  dz.mask = dy.mask;
  if (!dy.has_norm) return;
  dz.kind = OperandKind::kGradient;
  dz.z = dy.z;
  dz.batch_stats = dy.norm.batch_stats;
  space.output.fill(dy.norm, k, operand_channels(k));
  space.gradient.zero(operand_channels(k));
  for (int64_t i = 0; i < k && dz.batch_stats; ++i) {
    const double scale = static_cast<double>(space.output.scale[i]);
    const double rstd = static_cast<double>(static_cast<const S*>(dy.norm.rstd)[i]);
    space.gradient.b[i] =
        static_cast<S>(-scale * rstd * static_cast<double>(static_cast<const S*>(dy.dweight)[i]) / count);
    space.gradient.c[i] = static_cast<S>(-scale * static_cast<double>(static_cast<const S*>(dy.dbias)[i]) / count);
  }
  dz.mean = space.output.mean;
  dz.scale = space.output.scale;
  dz.bias = space.output.bias;
  dz.b = space.gradient.b;
  dz.c_term = space.gradient.c;
}

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
    const ConvShape& s = p.shape;
    WeightArgs& a = plan_.args;
    set_input(a.a, space_, p.x, s.c);
    set_gradient(a.dz, space_, p.dy, s.k, static_cast<double>(s.n * s.out_h() * s.out_w()));
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
      first = Plan(s, split, data_units(s, numerics), threads);
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
  const int64_t team = at_least(threads, 1);
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
  for (int64_t i = 0; i <= a.slices; ++i) first_unit[i] = ceil_div(a.slice_begin[i], plan->unit_blocks);
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

WeightArgs weight_args(const ConvShape& s) {
  WeightArgs a;
  a.groups = s.groups;
  a.group_c = s.c / s.groups;
  a.group_k = s.k / s.groups;
  a.rows = s.r;
  a.cols = s.s;
  a.stride_h = s.stride_h;
  a.stride_w = s.stride_w;
  a.pad_h = s.pad_h;
  a.pad_w = s.pad_w;
  a.dilation_h = s.dilation_h;
  a.dilation_w = s.dilation_w;
  a.a.n = a.dz.n = s.n;
  a.a.h = s.h;
  a.a.w = s.w;
  a.a.c = s.c;
  a.dz.h = s.out_h();
  a.dz.w = s.out_w();
  a.dz.c = s.k;
  if (pointwise(s)) {  // the pixels of all images are one row
    a.a.w = a.dz.w = s.n * s.h * s.w;
    a.a.n = a.dz.n = a.a.h = a.dz.h = 1;
  }
  return a;
}

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
