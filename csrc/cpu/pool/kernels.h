// What the stem driver hands to the kernels of one instruction set. Plain data.
#pragma once

#include <cstdint>

#include "batch_norm/kernels.h"  // kSums and its rows

namespace fused_resnet::cpu {

// Images (n, c, h, w) and pooled images (n, c, oh, ow); a chunk is some rows of
// one image (NHWC) or of one plane (NCHW): pooled rows, but input rows in the
// backward passes of NCHW.
struct PoolArgs {
  const void* x = nullptr;
  const void* dy = nullptr;
  void* y = nullptr;
  void* dx = nullptr;
  const uint8_t* argmax = nullptr;
  uint8_t* argmax_out = nullptr;  // nullable
  int64_t n = 0, c = 0, h = 0, w = 0, oh = 0, ow = 0;
  int64_t chunk_rows = 0;
  int64_t chunks_per_image = 0;  // NCHW: per plane
  int64_t channels_padded = 0;
  Layout layout = Layout::kNHWC;
  bool stream = false;
  Activation act = Activation::kIdentity;
  bool sum_slope = false;
  bool batch_stats = false;
  const void *mean = nullptr, *scale = nullptr, *bias = nullptr, *slope = nullptr;
  const void *b = nullptr, *c_term = nullptr;
  // backward_reduce, NHWC: stat dtype [chunk][kSums][channels_padded]; NCHW: double [chunk][kSums].
  // The rows are those of batch_norm/kernels.h.
  void* partials = nullptr;
};

using PoolKernel = void (*)(const PoolArgs& args, int64_t chunk_begin, int64_t chunk_end);

}  // namespace fused_resnet::cpu
