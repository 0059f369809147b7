// Whether a weight gradient goes through Winograd's algorithm, and how it is then cut. The kernel: winograd_weight.h.
#include <algorithm>

#include "conv/cuts.h"
#include "conv/weight_plan.h"
#include "isa.h"

namespace fused_resnet::cpu {
namespace {
#include "conv/winograd_layout.h"
#include "conv/winograd_weight_layout.h"

// Tiles of a chunk: its transformed operands and the sums that it is added to meet in the second-level cache, or, with
// many channels, in the third.
constexpr int64_t kChunkTiles = 28, kDeepChunkTiles = 64, kDeepChannels = 192;
static_assert(kDeepChunkTiles <= kMostUnitTiles);
// Of all slices' transformed sums.
constexpr int64_t kTransformedBytes = int64_t{5} << 20;
constexpr int64_t kSliceChunks = 3;
constexpr int64_t kLeastChannels = 16;
// Transformed gradients that stay in the second-level cache while all channels pass by: half of it, and at least this.
#ifdef FR_SECOND_LEVEL_CACHE_BYTES  // tests: one tile of filters a block
constexpr int64_t kLeastBlockBytes = 0;
#else
constexpr int64_t kLeastBlockBytes = int64_t{512} << 10;
#endif

// In multiplications' time, as winograd_pays has it, measured: a tile costs 36 a pair of channels and the transforms of
// its input and output channels; a chunk reads and writes the sums once; the last pass reads them and writes nine taps.
constexpr double kTileMac = 36 * 1.05, kTransform = 400, kSums = 36 * 4, kFinish = 36 * 20, kMargin = 1.2;

double tile_time(double c, double k) { return kTileMac * c * k + kTransform * (c + k); }

// Parts of the filters and of the channels with which the last of `threads` is done first. Every part of one operand
// transforms the other anew. What is added in which order is the same in any.
void set_parts(WeightArgs* a, int64_t panel, int64_t panels, int64_t filters, int64_t threads) {
  double best = 0;
  const int64_t most_k = std::min(a->k_tiles, 2 * threads), most_c = std::min(panels, 2 * threads);
  for (int64_t k = 1; k <= most_k; ++k) {
    for (int64_t c = 1; c <= most_c && k * c <= 2 * threads; ++c) {
      const int64_t rounds = divide_up(a->slices * k * c, threads);
      const double each = tile_time(static_cast<double>(divide_up(panels, c) * panel),
                                    static_cast<double>(divide_up(a->k_tiles, k) * filters));
      const double time = static_cast<double>(rounds) * each;
      if (best != 0 && time >= best) continue;
      best = time;
      a->k_parts = k;
      a->c_parts = c;
    }
  }
}

}  // namespace

bool winograd_weight_pays(const WeightArgs& a, double direct_speed) {
  const bool possible = a.groups == 1 && a.rows == 3 && a.cols == 3 && a.stride_h == 1 && a.stride_w == 1 &&
                        a.dilation_h == 1 && a.dilation_w == 1;
#ifdef FR_WINOGRAD_ALWAYS  // tests: small problems too
  return possible;
#endif
  const double c = static_cast<double>(a.group_c), k = static_cast<double>(a.group_k);
  const int64_t all = a.dz.n * divide_up(a.dz.h, kTileOut) * divide_up(a.dz.w, kTileOut);
  const double tiles = static_cast<double>(all), positions = static_cast<double>(a.dz.n * a.dz.h * a.dz.w);
  const double fast = tiles * tile_time(c, k) + (tiles / kChunkTiles * kSums + kFinish) * c * k;
  return possible && a.group_c >= kLeastChannels && a.group_k >= kLeastChannels &&
         9 * positions * c * k > kMargin * direct_speed * fast;
}

WeightPlan winograd_weight_plan(const ConvShape& s, const WeightKernelInfo& kernel, int threads) {
  WeightPlan plan;
  plan.kernel = kernel;
  plan.args = weight_args(s);
  WeightArgs& a = plan.args;
  const int64_t width = kernel.traits.width, filters = kernel.traits.filters;
  a.unit_tiles = 1;
  a.units = 1;
  const int64_t all = TileGrid(winograd_forward(a)).all;
  a.unit_tiles = std::min(all, std::min(a.group_c, a.group_k) >= kDeepChannels ? kDeepChunkTiles : kChunkTiles);
  a.units = divide_up(all, a.unit_tiles);
  a.k_tiles = divide_up(a.group_k, filters);
  const int64_t k_tile_bytes = kPoints * a.unit_tiles * filters * 4;
  a.chunk_k = std::max(std::max(second_level_cache_bytes() / 2, kLeastBlockBytes) / k_tile_bytes, int64_t{1});

  const WinogradWeightLayout at(a, winograd_forward(a), width, filters);
  const int64_t blocks = at.panels * a.k_tiles, bytes = blocks * at.block * 4;
  const int64_t most = std::min({a.units / kSliceChunks, kTransformedBytes / bytes, int64_t{kMaxSlices}});
  a.slices = std::max<int64_t>(most, 1);
  set_parts(&a, at.panel, at.panels, filters, std::max(threads, 1));
  plan.items = a.slices * a.k_parts * a.c_parts;
  plan.finish_items = a.units == 1 ? 0 : blocks;  // one chunk's blocks are finished at once
  plan.slots = std::min<int64_t>(std::max(threads, 1), plan.items);
  plan.sums_bytes = a.units == 1 ? 0 : a.slices * bytes;
  plan.scratch_bytes = WinogradWeightLayout(a, winograd_forward(a), width, filters).scratch() * 4;
  return plan;
}

}  // namespace fused_resnet::cpu
