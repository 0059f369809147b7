#include "conv/winograd.h"

#include <algorithm>

namespace fused_resnet::cpu {
namespace {
#include "conv/winograd_layout.h"

// A unit's transformed input and products share the second-level cache with a slice of the weight. Measured on Zen 5 at
// 64 to 256 channels, anything from 14 to 56 tiles is within a tenth: caches smaller than its 1 MB decide.
constexpr int64_t kUnitBytes = 640 * 1024;
constexpr int64_t kLeastTiles = 12, kUnitTiles = 28;

// From this many channels on, the weight is read from beyond the second-level cache for every unit: better that the
// unit's input does not fit either. 512 channels of 14 x 14, 8 images: 14 tiles are 1.30 times as fast as nine taps, 28
// tiles 1.67, 56 tiles 1.72 times.
constexpr int64_t kDeepChannels = 384;
constexpr int64_t kDeepTiles = 56;
static_assert(kDeepTiles <= kMostUnitTiles && kUnitTiles <= kMostUnitTiles);

constexpr int64_t kLeastChannels = 16;

}  // namespace

// `direct_speed`: of the direct kernel's multiplications, against single precision's. In multiplications' time,
// measured: a tile costs 36 a pair of channels, at 90 % of nine taps' speed, and 500 for each of its input and output
// channels' transforms; a filter costs 1000 to transform, or, where that was done before, to read from memory, which
// the products hide.
bool winograd_pays(const ConvArgs& a, double direct_speed, bool packed) {
  const auto neighbours = [](int taps, const int64_t* tap) {
    return taps == 3 && tap[1] == tap[0] + 1 && tap[2] == tap[0] + 2;
  };
  const bool possible = a.groups == 1 && neighbours(a.rows, a.row_tap) && neighbours(a.cols, a.col_tap) &&
                        a.step_h == 1 && a.step_w == 1 && a.out_step_h == 1 && a.out_step_w == 1;
#ifdef FR_WINOGRAD_ALWAYS  // tests: small problems too
  return possible;
#endif
  constexpr double kTileMac = 36 * 1.1, kTransform = 500, kFilter = 1000, kMargin = 1.1;
  const double c = static_cast<double>(a.a.c), k = static_cast<double>(a.k);
  const double tiles = static_cast<double>(TileGrid(a).all), positions = static_cast<double>(a.a.n * a.oh * a.ow);
  const double product = tiles * (kTileMac * c * k + kTransform * (c + k));
  const double fast = packed ? std::max(product, kFilter * c * k) : product + kFilter * c * k;
  return possible && a.a.c >= kLeastChannels && a.k >= kLeastChannels &&
         9 * positions * c * k > kMargin * direct_speed * fast;
}

void cut_winograd(ConvArgs* a, const ConvTraits& traits) {
  a->group_c = a->c_padded = a->a.c;  // the direct kernel may have padded them for its pairs
  a->split = 0;
  const int64_t each = 4 * kPoints * (a->a.c + a->vectors * traits.width);
  const int64_t fit = std::clamp(kUnitBytes / each, std::max<int64_t>(kLeastTiles, traits.tile), kUnitTiles);
  const int64_t most = a->a.c >= kDeepChannels ? kDeepTiles : fit;
  const int64_t all = TileGrid(*a).all;
  a->unit_tiles = std::min(all, most / traits.tile * traits.tile);
  a->units = (all + a->unit_tiles - 1) / a->unit_tiles;
}

int64_t winograd_scratch_bytes(const ConvArgs& a, const ConvTraits& traits) {
  return WinogradLayout(a, traits.width).scratch() * 4;
}

int64_t winograd_panel_bytes(const ConvArgs& a, const ConvTraits& traits) {
  const WinogradLayout layout(a, traits.width);
  return panel_count(a, traits) * kPoints * weight_plane(a.a.c, layout.panel) * 4;
}

int64_t winograd_unit_positions(const ConvArgs& a, int64_t unit) {
  int64_t positions = 0;
  for_strips(a, unit, [&](const TileStrip& strip, int64_t) {
    const int64_t j = strip.row * kTileOut, i = strip.col * kTileOut;
    positions += std::min(kTileOut, a.oh - j) * std::min(kTileOut * strip.count, a.ow - i);
  });
  return positions;
}

int64_t winograd_pack_items(const ConvArgs& a, const ConvTraits& traits) {
  return panel_count(a, traits) * pack_blocks(a.a.c);
}

}  // namespace fused_resnet::cpu
