#include <algorithm>

#include "batch_norm/params.h"
#include "conv/cuts.h"
#include "conv/weight_plan.h"
#include "fused_resnet/workspace.h"

namespace fused_resnet::cpu {
namespace {

// Pixels of a block: their sums are chains in registers.
constexpr int64_t kBlockPixels = 224;
// A chunk's packed operands stay in the second-level cache while every tap row and channel meets them.
constexpr int64_t kChunkBytes = 512 * 1024;
// Vectors of a chunk that are packed at once even where blocks get lower for it: reading a quarter of each pixel four
// times took twice as long as reading pixels whole.
constexpr int64_t kChunkVectors = 16;
// Items for each thread, where the slices alone do not divide among them.
constexpr int64_t kItems = 2;

}  // namespace

WeightPlan grouped_weight_plan(const ConvShape& s, const WeightKernelInfo& kernel, int threads) {
  WeightPlan plan;
  plan.kernel = kernel;
  WeightArgs& a = plan.args;
  a = weight_args(s);
  const int64_t width = kernel.traits.width, vectors = divide_up(s.k, width), size = kernel.traits.unit_size;

  a.block_w = even_part(a.dz.w, kBlockPixels);
  // Of one vector's packed operands, in blocks of this many rows.
  const auto plane = [&](int64_t block_h) {
    const int64_t rows = (block_h - 1) * a.stride_h + (a.rows - 1) * a.dilation_h + 1;
    const int64_t cols = (a.block_w - 1) * a.stride_w + (a.cols - 1) * a.dilation_w + 1;
    return (rows * cols + 1) * width * size;
  };
  const auto dz_plane = [&](int64_t block_h) { return (block_h * a.block_w + 1) * width * size; };
  int64_t rows = a.block_w < a.dz.w ? 1 : std::clamp<int64_t>(kBlockPixels / a.dz.w, 1, a.dz.h);
  while (rows > 1 && std::min(vectors, kChunkVectors) * (plane(rows) + dz_plane(rows)) > kChunkBytes) --rows;
  a.block_h = even_part(a.dz.h, rows);
  a.blocks_n = a.dz.n;
  a.blocks_h = divide_up(a.dz.h, a.block_h);
  a.blocks_w = divide_up(a.dz.w, a.block_w);

  const int64_t bytes = vectors * a.rows * a.cols * a.group_c * width * size;
  a.slices = std::clamp<int64_t>(std::min(a.blocks_n * a.blocks_h * a.blocks_w / kSliceBlocks, kSliceBytes / bytes), 1,
                                 kMaxSlices);
  plan.sums_bytes = a.slices * bytes;
  const bool divided = a.slices % std::max(threads, 1) == 0;
  a.k_parts = divided ? 1 : std::min(divide_up(kItems * threads, a.slices), vectors);
  plan.items = a.slices * a.k_parts;
  plan.finish_items = vectors;
  plan.slots = std::min<int64_t>(std::max(threads, 1), plan.items);

  const int64_t most = std::clamp<int64_t>(kChunkBytes / (plane(a.block_h) + dz_plane(a.block_h)), 1, vectors);
  a.chunk_k = even_part(divide_up(vectors, a.k_parts), most);
  // Scratch for a chunk does not depend on the number of parts, and so on the threads.
  Carver scratch(nullptr);
  scratch.take<char>(most * plane(a.block_h));
  a.dz_at = scratch.used();
  scratch.take<char>(most * dz_plane(a.block_h));
  plan.scratch_bytes = scratch.used();
  return plan;
}

}  // namespace fused_resnet::cpu
