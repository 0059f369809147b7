// What the driver of the weight gradient hands to the kernels of one instruction set. Plain data only, as in kernels.h.
#pragma once

#include <cstdint>

#include "conv/kernels.h"

namespace fused_resnet::cpu {

// dweight[k][c][tap] = sum over output pixels of dz[pixel][k] * a[pixel * stride + tap][c]: for every tap an outer
// product, summed over a block of pixels in registers, and over the blocks of a slice in memory.
//   step     `pair` output pixels: neighbours of a row, or with pair_images the same pixel of two images
//   unit     the `pair` values of one step and one channel
//   run      the steps of one image (or two) in one block, contiguous in the packed operands
//   k tile   up to `filters` filters;  c tile: `vectors` vectors of channels. One register tile is one of each.
//   chunk    k tiles and c tiles whose packed operands stay in the second-level cache
struct WeightTraits {
  int unit_size;  // bytes
  int pair;
  int width;  // channels of a vector
  int filters, vectors;
  int group = 1;  // steps that the kernel takes at once
  int split = 0;  // bfloat16 parts of a float: their units lie behind one another in every step; 0: whole
  int parts() const { return split > 0 ? split : 1; }
};

inline constexpr int kMaxSlices = 16;
inline constexpr int64_t kTileSlack = 16;  // units that are written behind the last step of a packed k tile
inline constexpr int kStageSteps = 8;      // steps of dz that are converted before they are dealt out to the tiles

enum class WeightPass : uint8_t { kAccumulate, kFinish };

struct WeightArgs {
  WeightPass pass = WeightPass::kAccumulate;
  ConvOperand a, dz;     // dz.h x dz.w are the output's extent
  bool dz_ahead = true;  // the next block's dz is asked for, not where what there is of it is in a cache
  int64_t groups = 1, group_c = 0, group_k = 0;
  int64_t rows = 1, cols = 1;  // taps
  int64_t stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1;

  // Few channels: all taps and channels (r, s, c) of a pixel are the channels of one virtual tap.
  bool fold = false;
  int64_t taps = 1;    // as the register tiles see them
  int64_t tile_c = 0;  // channels of a group as the register tiles see them
  int64_t a_step = 0;  // units from one step of a packed tile of `a` to the next
  bool pair_images = false;
  int split = 0;  // as in WeightTraits

  // Blocks and slices depend on the shape alone: they order the additions.
  int64_t block_n = 1, block_h = 1, block_w = 1;     // of output
  int64_t blocks_n = 1, blocks_h = 1, blocks_w = 1;  // how many
  int64_t slices = 1;
  int64_t slice_begin[kMaxSlices + 1] = {};         // [slice]: its first block
  int64_t first_block = 0, last_block = INT64_MAX;  // of an item's blocks, those of this call: all, or the next ones

  // Winograd: a chunk is at most this many tiles of 4x4 output pixels, and there are this many. 0: nine taps.
  int64_t unit_tiles = 0, units = 0;
  // Winograd, [item]: its operands have values that must not be transformed, and nothing is finished.
  // Split, [item][2]: the smallness of `a` and of dz (split_layout.h).
  uint8_t* unsafe = nullptr;

  // An item is a slice, a group, and parts of its tiles.
  int64_t k_tiles = 0, c_tiles = 0, k_parts = 1, c_parts = 1;
  int64_t chunk_k = 1, chunk_c = 1;  // tiles, at most

  // Bytes from the start of an item's scratch.
  int64_t dz_at = 0, a_at = 0, stage_at = 0, bias_at = 0;

  void* sums = nullptr;         // stat dtype [slice][group][tap][c tile][k][channels of a tile]
  double* bias_sums = nullptr;  // [slice][k]; nullable

  // kFinish: items are filters
  void* dweight = nullptr;
  bool float_dweight = false;                          // whatever the dtype
  int64_t out_k = 0, out_c = 0, out_r = 0, out_s = 0;  // strides
};

using WeightKernel = void (*)(const WeightArgs& args, int64_t item_begin, int64_t item_end, void* scratch);

struct WeightKernelInfo {
  WeightKernel kernel = nullptr;
  WeightTraits traits = {};
  const char* name = "";
};

// The kernel that runs on this machine now.
WeightKernelInfo conv_weight_kernel(DType dtype, int64_t groups);
WeightKernelInfo split_weight_kernel(int split);      // floats in that many parts; without a kernel where there is none
WeightKernelInfo grouped_weight_kernel(DType dtype);  // several groups to a vector; a width of 0: none
WeightKernelInfo winograd_weight_kernel(DType dtype);  // single precision inside; not for doubles

#define FR_WEIGHT_KERNEL(name) void name(const WeightArgs& args, int64_t item_begin, int64_t item_end, void* scratch);
FR_WEIGHT_KERNEL(conv_weight_gradient_f64_scalar)
FR_WEIGHT_KERNEL(conv_weight_gradient_f32_scalar)
FR_WEIGHT_KERNEL(conv_weight_gradient_bf16_scalar)
FR_WEIGHT_KERNEL(conv_weight_gradient_f16_scalar)
FR_WEIGHT_KERNEL(conv_weight_gradient_f64_avx2)
FR_WEIGHT_KERNEL(conv_weight_gradient_f32_avx2)
FR_WEIGHT_KERNEL(conv_weight_gradient_bf16_avx2)
FR_WEIGHT_KERNEL(conv_weight_gradient_f16_avx2)
FR_WEIGHT_KERNEL(conv_weight_gradient_f32_avx512)
FR_WEIGHT_KERNEL(conv_weight_gradient_bf16_avx512)
FR_WEIGHT_KERNEL(conv_weight_gradient_f16_avx512)
FR_WEIGHT_KERNEL(conv_weight_gradient_bf16_avx512_bf16)
FR_WEIGHT_KERNEL(conv_weight_gradient_bf16_amx)
FR_WEIGHT_KERNEL(conv_weight_gradient_f32_amx)
FR_WEIGHT_KERNEL(conv_winograd_weight_f32_scalar)
FR_WEIGHT_KERNEL(conv_winograd_weight_bf16_scalar)
FR_WEIGHT_KERNEL(conv_winograd_weight_f16_scalar)
FR_WEIGHT_KERNEL(conv_winograd_weight_f32_avx2)
FR_WEIGHT_KERNEL(conv_winograd_weight_bf16_avx2)
FR_WEIGHT_KERNEL(conv_winograd_weight_f16_avx2)
FR_WEIGHT_KERNEL(conv_winograd_weight_f32_avx512)
FR_WEIGHT_KERNEL(conv_winograd_weight_bf16_avx512)
FR_WEIGHT_KERNEL(conv_winograd_weight_f16_avx512)
#undef FR_WEIGHT_KERNEL

inline constexpr WeightTraits kWeightF64Scalar{8, 1, 1, 6, 2}, kWeightF32Scalar{4, 1, 1, 6, 2};
inline constexpr WeightTraits kWeightF64Avx2{8, 1, 4, 6, 2}, kWeightF32Avx2{4, 1, 8, 6, 2};
inline constexpr WeightTraits kWeightF32Avx512{4, 1, 16, 14, 2}, kWeightBf16Avx512Bf16{4, 2, 16, 14, 2};
inline constexpr WeightTraits kWeightAmx{4, 2, 16, 32, 2, 16};

}  // namespace fused_resnet::cpu
