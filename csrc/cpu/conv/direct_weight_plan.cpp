// How a weight gradient of whole vectors is cut: tap by tap, into blocks of pixels, slices of blocks, and parts of its
// tiles. What is added in which order depends on the shape alone.
#include <algorithm>

#include "conv/cuts.h"
#include "conv/weight_plan.h"
#include "fused_resnet/workspace.h"

namespace fused_resnet::cpu {
namespace {

// Steps of a block: a packed tile of `a` stays in the first-level cache while it meets all filters.
constexpr int64_t kBlockSteps = 224;
// Where they are cut to fit the data gradient's units, at most.
constexpr int64_t kMostBlockSteps = 256;
// Bytes of the packed operands of a chunk, each; for tiles, which are so fast that packing an operand again costs more.
constexpr int64_t kChunkBytes = int64_t{640} << 10, kTileChunkBytes = int64_t{1} << 20;
// Of all slices' sums of a 1x1 convolution, for tiles of bfloat16: more slices, so that threads share pixels, and
// neither packs what the other has packed. No slice's sums may take the place of the operands in the second-level
// cache, unless dz, which takes the longest to pack, is the larger operand.
constexpr int64_t kTileSliceBytes = int64_t{4} << 20, kMostSliceBytes = int64_t{512} << 10,
                  kMostWideBytes = int64_t{1} << 20;
// Few channels, so few that taps are folded into them.
constexpr int64_t kFoldRow = 64, kFoldAll = 512;

struct Plan : WeightPlan {
  Plan(const ConvShape& s, const WeightKernelInfo& which, const DataUnits& units, int threads) {
    kernel = which;
    args = weight_args(s);
    args.split = traits().split;
    set_tiles();
    set_blocks();
    set_slices(s, units.count > 0);
    fit_blocks(units);
    set_parts(std::max(threads, 1));
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
    a.k_tiles = divide_up(a.group_k, traits().filters);
    a.c_tiles = divide_up(a.tile_c, lanes());
    a.a_step = lanes() * traits().parts();
    if (a.fold) {
      const int64_t reach = (a.rows - 1) * row + round_up(row, traits().width);
      a.a_step = round_up(std::max(reach, a.c_tiles * lanes()), 16);
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
    a.blocks_n = divide_up(y.n, a.block_n);
    a.blocks_h = divide_up(y.h, a.block_h);
    a.blocks_w = divide_up(y.w, a.block_w);
  }

  void set_slices(const ConvShape& s, bool plain) {
    const int64_t blocks = args.blocks_n * args.blocks_h * args.blocks_w;
    const int64_t bytes = args.groups * args.taps * args.c_tiles * args.group_k * lanes() * stat_size(s.dtype);
    const bool many = tiles() && traits().split == 0 && plain &&
                      bytes <= (args.group_k > args.group_c ? kMostWideBytes : kMostSliceBytes);
    const int64_t most = many ? kTileSliceBytes : kSliceBytes;
    const int64_t slices = std::min({blocks / kSliceBlocks, most / bytes, int64_t{kMaxSlices}});
    args.slices = std::max<int64_t>(slices, 1);
    sums_bytes = args.slices * bytes;
    cut_slices(blocks, 1);
  }

  // Every slice begins with the first of `together` blocks.
  void cut_slices(int64_t blocks, int64_t together) {
    const int64_t runs = divide_up(blocks, together);
    for (int64_t i = 0; i <= args.slices; ++i) {
      args.slice_begin[i] = std::min(runs * i / args.slices * together, blocks);
    }
  }

  // Where there are slices for threads to share, a unit of the data gradient is whole blocks.
  void fit_blocks(const DataUnits& units) {
    WeightArgs& a = args;
    const int64_t slices = std::min(a.slices, units.count);
    if (slices < kLeastSlices) return;
    const int64_t pair = traits().pair, most = block_steps() * kMostBlockSteps / kBlockSteps * pair;
    const int64_t fewest = divide_up(units.pixels, most);
    int64_t each = fewest;
    while (units.pixels % (each * pair) != 0) {
      if (++each > 2 * fewest) return;
    }
    unit_blocks = each;
    a.slices = slices;
    a.block_w = units.pixels / each;
    a.blocks_w = divide_up(a.dz.w, a.block_w);
    cut_slices(a.blocks_w, each);
  }

  // Enough items that no thread has much more to do than another.
  void set_parts(int threads) {
    WeightArgs& a = args;
    const int64_t outer = a.slices * a.groups, limit = a.k_tiles * (a.fold ? 1 : a.c_tiles);
    int64_t parts = 1;
    for (; parts < limit && parts * outer < int64_t{8} * threads; ++parts) {
      const int64_t rounds = divide_up(outer * parts, threads);
      if (outer * parts * 10 >= rounds * threads * 9) break;
    }
    // Every part of one operand packs the other anew, and `a` is packed once for every tap column.
    const bool filters_first = a.fold || a.taps > 1 || a.group_k >= a.group_c;
    if (filters_first) {
      a.k_parts = std::min(parts, a.k_tiles);
      a.c_parts = std::min(divide_up(parts, a.k_parts), a.fold ? int64_t{1} : a.c_tiles);
    } else {
      a.c_parts = std::min(parts, a.c_tiles);
      a.k_parts = std::min(divide_up(parts, a.c_parts), a.k_tiles);
    }
    items = outer * a.k_parts * a.c_parts;
    slots = std::min<int64_t>(threads, items);
  }

  void set_scratch(const ConvShape& s) {
    WeightArgs& a = args;
    // A unit with all of its parts.
    const int64_t pair = traits().pair, unit = traits().unit_size * traits().parts(), stat = stat_size(s.dtype);
    const int64_t runs = a.pair_images ? divide_up(a.block_n, pair) : a.block_n;
    const int64_t row_steps = a.pair_images ? a.block_w : divide_up(a.block_w, pair);
    const int64_t steps = runs * a.block_h * row_steps;
    const int64_t dz_steps = round_up(steps, traits().group);

    const int64_t k_tile = (dz_steps * traits().filters + kTileSlack) * unit;
    // Room for a chunk does not depend on the number of parts, and so on the threads.
    const int64_t chunk_bytes = tiles() ? kTileChunkBytes : kChunkBytes;
    const int64_t most_k = std::min(a.k_tiles, std::max<int64_t>(chunk_bytes / k_tile, 1));
    a.chunk_k = even_part(divide_up(a.k_tiles, a.k_parts), most_k);
    const int64_t chunk_filters = most_k * traits().filters + 32;

    int64_t c_bytes = steps * a.a_step * traits().unit_size, stage = 0;
    if (a.fold) {
      a.chunk_c = a.c_tiles;
      const int64_t span = (a.block_h - 1) * a.stride_h + (a.rows - 1) * a.dilation_h + 1;
      stage = (span * ((row_steps * pair - 1) * a.stride_w + a.cols) * a.group_c + 32) * stat;
    } else {
      const int64_t c_tile = a.cols * runs * packed_rows() * row_steps * lanes() * unit;
      const int64_t most_c = std::min(a.c_tiles, std::max<int64_t>(chunk_bytes / c_tile, 1));
      a.chunk_c = even_part(divide_up(a.c_tiles, a.c_parts), most_c);
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
    a.stage_at = take(std::max(stage, kStageSteps * (chunk_filters + 16) * unit));
    a.bias_at = take(chunk_filters * stat);
    scratch_bytes = std::max(scratch.used(), round_up(a.taps * lanes() * 8, 64));
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

}  // namespace

bool pointwise(const ConvShape& s) {
  return s.r == 1 && s.s == 1 && s.stride_h == 1 && s.stride_w == 1 && s.pad_h == 0 && s.pad_w == 0;
}

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

WeightPlan direct_weight_plan(const ConvShape& s, const WeightKernelInfo& kernel, const DataUnits& units, int threads) {
  return Plan(s, kernel, units, threads);
}

}  // namespace fused_resnet::cpu
