// What the convolution drivers hand to the kernels of one instruction set. Plain data only, as in batch_norm/kernels.h.
#pragma once

#include <cstdint>

#include "fused_resnet/types.h"

namespace fused_resnet::cpu {

// Kernels of more taps in a row or column are not ours.
inline constexpr int kMaxTaps = 16;

enum class OperandKind : uint8_t { kPlain, kNorm, kGradient };

// An NHWC tensor, and what its elements become while they are packed. Per-channel arrays are of the stat dtype, padded
// to kChannelPad.
struct ConvOperand {
  OperandKind kind = OperandKind::kPlain;
  const void* data = nullptr;
  int64_t n = 0, h = 0, w = 0, c = 0;
  const uint8_t* mask = nullptr;  // nullable, not with kNorm: elements without a bit count as zero

  // kNorm: act((data - mean) * scale + bias).   kGradient: data * scale [+ (z - mean) * b + c_term with batch_stats].
  const void *mean = nullptr, *scale = nullptr, *bias = nullptr;
  Activation act = Activation::kIdentity;
  const void* slope = nullptr;
  const void* z = nullptr;
  bool batch_stats = false;
  const void *b = nullptr, *c_term = nullptr;
};

enum class Epilogue : uint8_t { kStore, kStats, kMaskedSums };

struct ConvPackArgs;

// Output position (j, i) of image m, filter f:
//   sum over taps (t, u) and channels of a[m, j * step_h + row_tap[t], i * step_w + col_tap[u]] * weight[f, ...]
// lands in y at row j * out_step_h + out_first_h, column i * out_step_w + out_first_w. Positions outside the operand
// count as zero. The data gradient of a strided convolution is several of these.
struct ConvArgs {
  ConvOperand a;
  int64_t groups = 1;
  int rows = 0, cols = 0;  // taps
  int64_t row_tap[kMaxTaps] = {}, col_tap[kMaxTaps] = {};
  int64_t step_h = 1, step_w = 1;
  int64_t oh = 0, ow = 0;    // positions
  int64_t y_h = 0, y_w = 0;  // extent of y
  int64_t out_step_h = 1, out_step_w = 1, out_first_h = 0, out_first_w = 0;

  // A unit of work: `images` images, `block_h` x `block_w` positions. Units depend on the shape alone.
  int64_t images = 1, block_h = 1, block_w = 1;
  int64_t units = 0;
  int64_t splits = 1;        // parts that the filters of one unit are cut into: an item is a unit and a part
  int split = 0;             // bfloat16 parts of a float; 0: operands are not split
  bool direct = false;       // the operand is read where it is, without packing
  int64_t planes = 1;        // packed columns of one remainder by it, the stride, are neighbours
  int64_t c_padded = 0;      // channels of a packed pixel
  int fold = 0;              // columns of taps that are one run of channels with them, `cols` is 1 then; 0: none
  int64_t group_c = 0;       // channels a group, as the panels have them (even where the kernel takes pairs)
  int vectors = 2;           // of a panel: 1 or 2
  bool tiles_first = false;  // all panels of one tile, not all tiles of one panel

  // Winograd: a unit is at most this many tiles of 4x4 positions. 0: nine taps.
  int64_t unit_tiles = 0;
  const ConvPackArgs* raw = nullptr;  // with unit_tiles or split: for units that can be neither

  // [group][panel][tap row][tap column][channel][panel width], the compute type, zero where there is no filter; with
  // unit_tiles [panel][point][channel][panel width], with split as split_layout.h says
  const void* weight = nullptr;
  int64_t k = 0;

  Epilogue epilogue = Epilogue::kStore;
  void* y = nullptr;
  bool stream = false;                     // y is written past the caches
  const void* bias = nullptr;              // stat dtype, padded; nullable
  Activation act = Activation::kIdentity;  // kStore
  const void* act_slope = nullptr;         // stat dtype, padded
  const void* skip = nullptr;              // of y's shape; nullable; may be y
  const uint8_t* skip_mask = nullptr;
  // kMaskedSums: y = act'((z - mean) * scale + bias') * value, and sums of y and y * (z - mean)
  const void* z = nullptr;
  const void *z_mean = nullptr, *z_scale = nullptr, *z_bias = nullptr;
  Activation z_act = Activation::kIdentity;
  const void* z_slope = nullptr;

  // stat dtype [unit][kConvSums][k_padded]. kStats: shift, sum (y - shift), sum (y - shift)^2; kMaskedSums: unused, sum
  // y, sum y * (z - mean).
  void* partials = nullptr;
  int64_t k_padded = 0;
};

inline constexpr int kConvSums = 3;
inline constexpr int64_t kPanelSumsBytes = 512;  // of scratch, for each panel

// How a weight (k, c / groups, r, s) of any strides becomes panels, or the panels of its transpose, for some of its
// taps.
struct ConvPackArgs {
  const void* weight = nullptr;
  int64_t stride_out = 0, stride_in = 0, stride_row = 0, stride_col = 0;  // elements
  int64_t group_stride = 0;                                               // from one group to the next
  int64_t groups = 1, outs = 0, ins = 0;                                  // of one group
  bool floats = false;                                                    // the weight is, whatever the dtype
  int vectors = 2;
  int split = 0;
  int rows = 0, cols = 0, fold = 0;                            // as in ConvArgs
  int64_t row_index[kMaxTaps] = {}, col_index[kMaxTaps] = {};  // which taps of the weight
  void* panels = nullptr;
  // Winograd: for every panel and block of channels, whether a weight is not finite or near overflow; split: for every
  // panel, how small its weights get (split_layout.h)
  uint8_t* unsafe = nullptr;
};

using ConvKernel = void (*)(const ConvArgs& args, int64_t item_begin, int64_t item_end, void* scratch);
// Panels [begin, end) of all groups, in order.
using ConvPackKernel = void (*)(const ConvPackArgs& args, int64_t panel_begin, int64_t panel_end);

// What the drivers must know of a kernel to lay out its operands.
struct ConvTraits {
  int compute_size;      // bytes of the compute type
  int width;             // filters of a vector; a panel has one or two
  int pair;              // channels that one step of the kernel takes
  int tile;              // positions of a register tile, at most
  bool native;           // the compute type is the dtype: operands may be read in place
  int split;             // the compute type is this many bfloat16, whose sum is the float; 0: it is one number
  bool grouped = false;  // a vector of filters holds whole groups; packed pixels are padded to vectors
};

}  // namespace fused_resnet::cpu
