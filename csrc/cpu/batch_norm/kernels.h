// What the batch-norm drivers hand to the kernels of one instruction set.
// Plain data only: kernel files are built for wide instruction sets and must not
// instantiate inline functions that other files share.
#pragma once

#include <cstdint>

#include "fused_resnet/types.h"

namespace fused_resnet::cpu {

enum class ResidualKind : uint8_t { kNone, kAdd, kNorm };

// A tensor is `rows` rows of `length` contiguous elements:
// NHWC: a row is one pixel, length = C.   NCHW: a row is one plane, length = H * W.
// Work comes in chunks of `chunk_rows` rows; the last chunk may be short. Chunks
// depend on the shape alone, never on the number of threads.
struct BnArgs {
  const void* x = nullptr;
  const void* dy = nullptr;
  const void* residual = nullptr;
  const void* skip = nullptr;  // backward_apply, nullable: added to dx; without residual and activation
  void* y = nullptr;
  void* dx = nullptr;             // nullable
  void* dresidual = nullptr;      // nullable
  const uint8_t* mask = nullptr;  // backward: nullable
  uint8_t* mask_out = nullptr;    // forward: nullable
  int64_t rows = 0;
  int64_t length = 0;
  int64_t chunk_rows = 0;
  int64_t channels = 0;
  int64_t channels_padded = 0;  // a multiple of kChannelPad
  Layout layout = Layout::kNHWC;
  bool stream = false;  // write past the caches
  ResidualKind residual_kind = ResidualKind::kNone;
  Activation act = Activation::kIdentity;
  bool sum_slope = false;  // backward_reduce: prelu's slope gradient is wanted
  // backward_apply: fixed statistics have no b and c, and 0 * inf must not appear.
  bool batch_stats = false, r_batch_stats = false;

  // Per-channel, stat dtype, (channels_padded,):
  //   pre = (x - mean) * scale + bias [+ residual | + (residual - r_mean) * r_scale + r_bias]
  //   dx  = g * scale [+ (x - mean) * b + c with batch statistics],  likewise for the residual's norm
  const void *mean = nullptr, *scale = nullptr, *bias = nullptr;
  const void *r_mean = nullptr, *r_scale = nullptr, *r_bias = nullptr;
  const void* slope = nullptr;  // leaky_relu and prelu
  const void *b = nullptr, *c = nullptr;
  const void *r_b = nullptr, *r_c = nullptr;

  // stats, NHWC:  stat dtype [chunk][3][channels_padded]: shift, sum (x - shift), sum (x - shift)^2; the shift is the
  //               same for all chunks and stands in the first chunk of every range that a thread got
  // stats, NCHW:  double [row][2]: mean, sum (x - mean)^2
  // backward_reduce, NHWC: stat dtype [chunk][kSums][channels_padded];  NCHW: double [row][kSums]
  void* partials = nullptr;
};

inline constexpr int64_t kChannelPad = 16;

// Rows of the backward partials.
inline constexpr int kSumG = 0;      // sum g = dbias
inline constexpr int kSumGX = 1;     // sum g * (x - mean)
inline constexpr int kSumGR = 2;     // sum g * (residual - r_mean)
inline constexpr int kSumSlope = 3;  // sum dy * pre where pre <= 0
inline constexpr int kSums = 4;
inline constexpr int kStatSums = 3;

using BnKernel = void (*)(const BnArgs& args, int64_t chunk_begin, int64_t chunk_end);

}  // namespace fused_resnet::cpu
