// What the pooling driver hands to the kernels of one instruction set. Plain data.
#pragma once

#include "fused_resnet/window.h"

namespace fused_resnet::cpu {

// Items are blocks of channels of rows of y, rows before blocks.
struct WindowArgs {
  WindowForward p;
  int64_t block = 0;   // channels of an item, at most
  int64_t blocks = 0;  // of a pixel
};

using WindowKernel = void (*)(const WindowArgs& args, int64_t begin, int64_t end);

}  // namespace fused_resnet::cpu
