#include "conv/geometry.h"

#include <algorithm>

#include "batch_norm/kernels.h"
#include "conv/cuts.h"
#include "conv/winograd.h"
#include "fused_resnet/capability.h"

namespace fused_resnet::cpu {
namespace {
#include "conv/split_layout.h"

// A packed patch shares the second-level cache with a panel of the weight. Processors with tiles have 2 MB of it: the
// larger the patch, the less often weights come from beyond it. Units, and with them the bits of statistics, depend on
// this: it must not be what the machine says.
constexpr int64_t kPatchBytes = 256 * 1024, kTilePatchBytes = 512 * 1024;
// Weights that stay there while tiles pass by: a quarter of it, since another hyperthread may use half.
int64_t resident_weight_bytes(const ConvArgs& a) {
  constexpr int64_t kLeast = 192 * 1024;
  return a.split > 0 ? kSplitBlockBytes : std::max(kLeast, second_level_cache_bytes() / 4);
}
// Sums of one unit are single-precision chains.
constexpr int64_t kMostPositions = 1024;

// Positions of a register tile this many bytes apart would share so few sets of the first-level cache that they drive
// each other out; this many, and all of them meet in one.
constexpr int64_t kAliasBytes = 2048, kOneSetBytes = 4096;
constexpr int kLeastWays = 8;
// So many filters pay for a copy of what could be read in place: measured 0.98 to 1.04 times the speed at 256 filters,
// 1.02 to 1.04 at 512.
constexpr int64_t kCopyFilters = 256;
constexpr int64_t kLineBytes = 64;
constexpr int kTileStep = 32;       // channels of a step of AMX
constexpr int64_t kSplitBytes = 2;  // of one part of a float, where its neighbours' parts lie beside it

int64_t packed_extent(int64_t positions, int64_t step, int taps, const int64_t* tap) {
  return taps <= 1 ? positions : (positions - 1) * step + tap[taps - 1] - tap[0] + 1;
}

int64_t patch_elements(const ConvArgs& a, int64_t block_h, int64_t block_w, int64_t images) {
  const int64_t cols = packed_extent(block_w, a.step_w, a.cols, a.col_tap);
  return packed_extent(block_h, a.step_h, a.rows, a.row_tap) * divide_up(cols, a.planes) * a.planes * images *
         a.c_padded;
}

// A 1x1 convolution without stride and padding has no neighbours: all pixels are one row.
void flatten(ConvArgs* a) {
  const bool plain = a->rows == 1 && a->cols == 1 && a->fold == 0 && a->row_tap[0] == 0 && a->col_tap[0] == 0 &&
                     a->step_h == 1 && a->step_w == 1 && a->out_step_h == 1 && a->out_step_w == 1;
  if (!plain) return;
  a->a.w *= a->a.n * a->a.h;
  a->a.n = a->a.h = 1;
  a->ow = a->y_w = a->a.w;
  a->oh = a->y_h = 1;
}

// Channels that would leave most of a tile's step empty, with columns of taps that are neighbours.
bool fills_by_folding(const ConvArgs& a, const ConvTraits& traits) {
  if (traits.pair < kTileStep || a.groups > 1 || a.a.c >= traits.pair || a.cols < 2) return false;
  for (int u = 1; u < a.cols; ++u) {
    if (a.col_tap[u] != a.col_tap[0] + u) return false;
  }
  return true;
}

void cut(ConvArgs* a, const ConvTraits& traits) {
  const int64_t group_k = a->k / a->groups, group_c = a->a.c / a->groups;
  a->vectors = group_k <= traits.width ? 1 : 2;
  if (fills_by_folding(*a, traits)) {
    a->fold = a->cols;
    a->cols = 1;
  }
  a->group_c = divide_up(std::max(a->fold, 1) * group_c, traits.pair) * traits.pair;
  a->c_padded = traits.grouped ? divide_up(a->a.c, traits.width) * traits.width : a->groups * a->group_c;
  a->split = traits.split;
  a->k_padded = divide_up(a->k, kChannelPad) * kChannelPad;
  flatten(a);
  // With a stride, images fill a register tile only where columns that a tap meets are neighbours.
  const bool strided = a->step_w > 1 && a->cols > 1;
  if (strided && !traits.grouped && a->group_c >= kTileStep && 2 * a->ow <= traits.tile && a->a.n > 1) {
    a->planes = a->step_w;
  }
  const int64_t step = strided && a->planes == 1 ? a->step_w : 1;
  const int64_t size = a->split > 0 ? kSplitBytes : traits.compute_size;
  if (!traits.grouped && step * a->c_padded * size % kAliasBytes == 0) a->c_padded += kLineBytes / size;

  const bool tiles = traits.pair == kTileStep && a->split == 0;
  const int64_t budget = (tiles ? kTilePatchBytes : kPatchBytes) / traits.compute_size;
  const bool linear = !strided || a->planes > 1;
  a->images = 1;
  a->block_h = 1;
  a->block_w = a->ow;
  if (patch_elements(*a, 1, a->ow, 1) > budget || a->ow > kMostPositions) {
    // Whole register tiles, at least four of them so that a panel of the weight serves more than once.
    const int64_t least = 4 * traits.tile;
    int64_t fit = std::min(kMostPositions, a->ow);
    while (fit > least && patch_elements(*a, 1, fit, 1) > budget) fit -= traits.tile;
    const int64_t blocks = divide_up(a->ow, std::max(fit, int64_t{1}));
    a->block_w = std::min(a->ow, divide_up(divide_up(a->ow, blocks), traits.tile) * traits.tile);
  } else {
    // Short rows: neighbouring images side by side fill the register tile.
    if (linear && a->ow < traits.tile) a->images = std::clamp<int64_t>(traits.tile / a->ow, 1, a->a.n);
    const auto fits = [&](int64_t rows) {
      return rows * a->ow * a->images <= kMostPositions && patch_elements(*a, rows, a->ow, a->images) <= budget;
    };
    int64_t rows = 1;
    while (rows < a->oh && fits(rows + 1)) ++rows;
    a->block_h = divide_up(a->oh, divide_up(a->oh, rows));
  }
  a->tiles_first = panel_bytes(*a, traits) <= resident_weight_bytes(*a);
  a->units = divide_up(a->ow, a->block_w) * divide_up(a->oh, a->block_h) * divide_up(a->a.n, a->images);
}

// Products for each of an operand's and a result's values: the first are what tiles save, the second what parts cost.
double products_per_value(const ConvShape& s) {
  const double c = static_cast<double>(s.c), k = static_cast<double>(s.k);
  return static_cast<double>(s.r * s.s) * c * k / (c + k);
}

}  // namespace

ConvArgs forward_geometry(const ConvShape& s, const ConvTraits& traits) {
  ConvArgs a;
  a.a.n = s.n;
  a.a.h = s.h;
  a.a.w = s.w;
  a.a.c = s.c;
  a.groups = s.groups;
  a.rows = static_cast<int>(s.r);
  a.cols = static_cast<int>(s.s);
  for (int t = 0; t < a.rows; ++t) a.row_tap[t] = t * s.dilation_h - s.pad_h;
  for (int u = 0; u < a.cols; ++u) a.col_tap[u] = u * s.dilation_w - s.pad_w;
  a.step_h = s.stride_h;
  a.step_w = s.stride_w;
  a.oh = a.y_h = s.out_h();
  a.ow = a.y_w = s.out_w();
  a.k = s.k;
  cut(&a, traits);
  return a;
}

int64_t backward_data_parts(const ConvShape& s) { return std::min(s.stride_h, s.h) * std::min(s.stride_w, s.w); }

BackwardDataPart backward_data_geometry(const ConvShape& s, const ConvTraits& traits, int64_t part) {
  BackwardDataPart p;
  ConvArgs& a = p.args;
  a.a.n = s.n;
  a.a.h = s.out_h();
  a.a.w = s.out_w();
  a.a.c = s.k;
  a.groups = s.groups;
  a.k = s.c;
  a.y_h = s.h;
  a.y_w = s.w;
  // Row y = position * stride + first of dx takes row (y + pad - t * dilation) / stride of dy where that is whole.
  const auto taps = [](int64_t first, int64_t count, int64_t stride, int64_t pad, int64_t dilation, int64_t* tap,
                       int64_t* index) {
    int n = 0;
    for (int64_t t = count - 1; t >= 0; --t) {
      const int64_t distance = first + pad - t * dilation;
      if (distance % stride != 0) continue;
      tap[n] = distance / stride;
      index[n++] = t;
    }
    return n;
  };
  const int64_t across = std::min(s.stride_w, s.w);
  a.out_step_h = s.stride_h;
  a.out_step_w = s.stride_w;
  a.out_first_h = part / across;
  a.out_first_w = part % across;
  a.oh = divide_up(s.h - a.out_first_h, s.stride_h);
  a.ow = divide_up(s.w - a.out_first_w, s.stride_w);
  a.rows = taps(a.out_first_h, s.r, s.stride_h, s.pad_h, s.dilation_h, a.row_tap, p.pack.row_index);
  a.cols = taps(a.out_first_w, s.s, s.stride_w, s.pad_w, s.dilation_w, a.col_tap, p.pack.col_index);
  if (a.rows == 0 || a.cols == 0) a.rows = a.cols = 0;
  p.pack.rows = a.rows;
  cut(&a, traits);
  p.pack.cols = a.cols;
  p.pack.fold = a.fold;
  return p;
}

bool fills_tiles(const ConvShape& s, int64_t channels) {
  return s.groups == 1 && (channels >= kTileStep || (s.dtype == DType::kBFloat16 && s.dilation_w == 1));
}

// Bounds from ResNet-50 on Emerald Rapids, batch 16: docs/convolution.md. Six products: 256 -> 128 channels won, 64 ->
// 256 did not. With less positions than that the weights' parts cost as much as is saved; packed before, they are half
// as much again to read, and made a single image 5% slower.
int conv_split(const ConvShape& s, const ConvNumerics& numerics) {
  constexpr double kLeastOfSix = 80, kLeastOfThree = 32;
  constexpr int64_t kLeastPositions = 1024;
  if (numerics.split == 0 || !numerics.split_where_faster) return numerics.split;
  const double products = products_per_value(s);
  if (numerics.split == 2) return products >= kLeastOfThree ? 2 : 0;
  const bool enough = s.n * s.out_h() * s.out_w() >= kLeastPositions;
  return enough && products >= kLeastOfSix ? numerics.split : 0;
}

// Six products: every tap column packs its own parts of `a`, which more than one did not earn back.
int weight_split(const ConvShape& s, const ConvNumerics& numerics) {
  constexpr double kLeastOfSix = 100, kLeastOfThree = 64;
  if (numerics.split == 0 || !numerics.split_where_faster) return numerics.split;
  const int64_t taps = s.r * s.s;
  const double products = products_per_value(s) / static_cast<double>(taps);
  if (numerics.split == 2) return products >= kLeastOfThree ? 2 : 0;
  const bool plain = taps == 1 && s.stride_h == 1 && s.stride_w == 1;
  return plain && products >= kLeastOfSix ? numerics.split : 0;
}

bool groups_share_vectors(const ConvShape& s, int64_t width) {
  const int64_t group = s.c / s.groups;
  return s.groups > 1 && s.c == s.k && group < width && width % group == 0;
}

void settle(ConvArgs* a, const ConvTraits& traits) {
  const auto inside = [](int64_t positions, int64_t step, int taps, const int64_t* tap, int64_t extent) {
    return taps == 0 || (tap[0] >= 0 && (positions - 1) * step + tap[taps - 1] < extent);
  };
  a->direct = traits.native && !traits.grouped && a->a.kind == OperandKind::kPlain && a->a.mask == nullptr &&
              a->groups * a->group_c == a->a.c && a->images == 1 && a->planes == 1 &&
              inside(a->oh, a->step_h, a->rows, a->row_tap, a->a.h) &&
              inside(a->ow, a->step_w, a->cols, a->col_tap, a->a.w);
}

bool better_packed(const ConvArgs& a, const ConvTraits& traits) {
  // Tiles of AMX read whole lines, once.
  return traits.pair < kTileStep && traits.tile > kLeastWays &&
         a.step_w * a.a.c * traits.compute_size % kOneSetBytes == 0 && a.k / a.groups / a.splits >= kCopyFilters;
}

int64_t scratch_bytes(const ConvArgs& a, const ConvTraits& traits) {
  if (a.unit_tiles > 0) return winograd_scratch_bytes(a, traits);
  const int64_t patch = patch_elements(a, a.block_h, a.block_w, a.images) * traits.compute_size;
  const int64_t between = traits.grouped ? a.c_padded * traits.compute_size : 0;  // planes
  const int64_t staged = a.fold > 0 ? ((a.block_w - 1) * a.step_w + a.fold) * a.a.c + kTileStep * 2 : 0;
  const int64_t before = a.split > 0 ? SplitLayout(a, traits.width).patch : panel_count(a, traits) * kPanelSumsBytes;
  return before + divide_up(patch + between + staged * traits.compute_size, 64) * 64 + 64;
}

int64_t panel_count(const ConvArgs& a, const ConvTraits& traits) {
  if (traits.grouped) return divide_up(a.k, traits.width);
  return a.groups * divide_up(a.k / a.groups, a.vectors * traits.width);
}

int64_t pack_items(const ConvArgs& a, const ConvTraits& traits) {
  return a.unit_tiles > 0 ? winograd_pack_items(a, traits) : panel_count(a, traits);
}

int64_t panel_bytes(const ConvArgs& a, const ConvTraits& traits) {
  if (a.unit_tiles > 0) return winograd_panel_bytes(a, traits);
  return panel_count(a, traits) * a.rows * a.cols * a.group_c * a.vectors * traits.width * traits.compute_size;
}

int64_t unit_positions(const ConvArgs& a, int64_t unit) {
  if (a.unit_tiles > 0) return winograd_unit_positions(a, unit);
  const int64_t across = divide_up(a.ow, a.block_w), down = divide_up(a.oh, a.block_h);
  const auto length = [](int64_t index, int64_t block, int64_t extent) {
    return std::min(block, extent - index * block);
  };
  return length(unit % across, a.block_w, a.ow) * length(unit / across % down, a.block_h, a.oh) *
         length(unit / across / down, a.images, a.a.n);
}

}  // namespace fused_resnet::cpu
