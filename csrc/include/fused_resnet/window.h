// Pooling over windows, NHWC and dense, without gradients: what inference needs.
#pragma once

#include "fused_resnet/types.h"

namespace fused_resnet {

enum class WindowKind : uint8_t { kMax, kMean };

// y (n, out_h, out_w, c) from x (n, h, w, c). As torch's max_pool2d and avg_pool2d have it: a maximum takes a NaN, and
// never the padding; a mean divides by the elements it has read, or, with `count_padding`, by the window's elements up
// to the padded border.
struct WindowForward {
  WindowKind kind = WindowKind::kMax;
  DType dtype = DType::kFloat32;
  int64_t n = 0, h = 0, w = 0, c = 0, out_h = 0, out_w = 0;
  int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0;
  int64_t dilation_h = 1, dilation_w = 1;  // kMax only
  bool count_padding = true;
  const void* x = nullptr;
  void* y = nullptr;
  Runner runner;
};

namespace cpu {
Status window_forward(const WindowForward& p);
}  // namespace cpu

}  // namespace fused_resnet
