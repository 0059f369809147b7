// Whether a weight gradient goes through Winograd's algorithm, and how it is then cut. The kernel: winograd_weight.h.
#include <algorithm>

#include "conv/weight_plan.h"

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

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

// In multiplications' time, as winograd_pays has it: a chunk reads and writes the sums once, and the last pass reads
// them and writes nine taps.
bool winograd_weight_pays(const WeightArgs& a, double direct_speed) {
  const bool possible = a.groups == 1 && a.rows == 3 && a.cols == 3 && a.stride_h == 1 && a.stride_w == 1 &&
                        a.dilation_h == 1 && a.dilation_w == 1;
#ifdef FR_WINOGRAD_ALWAYS  // tests: small problems too
  return possible;
#endif
  constexpr double kTileMac = 36 * 1.05, kTransform = 400, kSums = 36 * 4, kFinish = 36 * 20, kMargin = 1.1;
  const double c = static_cast<double>(a.group_c), k = static_cast<double>(a.group_k);
  const int64_t all = a.dz.n * divide_up(a.dz.h, kTileOut) * divide_up(a.dz.w, kTileOut);
  const double tiles = static_cast<double>(all), positions = static_cast<double>(a.dz.n * a.dz.h * a.dz.w);
  const double chunks = tiles / kChunkTiles;
  const double fast = tiles * (kTileMac * c * k + kTransform * (c + k)) + (chunks * kSums + kFinish) * c * k;
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

  const WinogradWeightLayout at(a, winograd_forward(a), width, filters);
  const int64_t blocks = at.panels * a.k_tiles, bytes = blocks * at.block * 4;
  const int64_t most = std::min({a.units / kSliceChunks, kTransformedBytes / bytes, int64_t{kMaxSlices}});
  a.slices = std::max<int64_t>(most, 1);
  // Every part of the filters transforms the input anew.
  const bool divided = a.slices % std::max(threads, 1) == 0;
  a.k_parts = divided ? 1 : std::min(divide_up(threads, a.slices), a.k_tiles);
  plan.items = a.slices * a.k_parts;
  plan.finish_items = a.units == 1 ? 0 : blocks;  // one chunk's blocks are finished at once
  plan.slots = std::min<int64_t>(std::max(threads, 1), plan.items);
  plan.sums_bytes = a.units == 1 ? 0 : a.slices * bytes;
  plan.scratch_bytes = at.scratch() * 4;
  return plan;
}

}  // namespace fused_resnet::cpu
