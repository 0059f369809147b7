// Pooling over windows: rows of the output, and blocks of channels, are spread over the caller's threads.
#include <algorithm>

#include "dispatch.h"
#include "fused_resnet/window.h"
#include "parallel.h"

namespace fused_resnet::cpu {
namespace {

// Channels of an item: a global mean of one image has a single row.
constexpr int64_t kBlock = 256;

}  // namespace

Status window_forward(const WindowForward& p) {
  if (p.n <= 0 || p.c <= 0 || p.h <= 0 || p.w <= 0 || p.out_h <= 0 || p.out_w <= 0) {
    return {"window: a tensor is empty"};
  }
  if (p.kernel_h < 1 || p.kernel_w < 1 || p.stride_h < 1 || p.stride_w < 1 || p.dilation_h < 1 || p.dilation_w < 1) {
    return {"window: kernel, stride and dilation must be positive"};
  }
  WindowArgs a;
  a.p = p;
  a.block = std::min(p.c, kBlock);
  a.blocks = (p.c + a.block - 1) / a.block;
  const WindowKernel kernel = window_kernel(p.kind == WindowKind::kMax ? WindowPass::max : WindowPass::mean, p.dtype);
  const int64_t taps = p.n * p.out_h * p.out_w * p.c * p.kernel_h * p.kernel_w;
  for_chunks(p.runner, p.n * p.out_h * a.blocks, taps, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return {};
}

}  // namespace fused_resnet::cpu
