// A weight as the kernels read it, in panels of filters.
#pragma once

#include "conv/geometry.h"
#include "dispatch.h"
#include "fused_resnet/conv.h"
#include "fused_resnet/workspace.h"

namespace fused_resnet::cpu {

// Where the weight lies whose taps `w` names, or its transpose, and where its panels go.
void point_at_weight(const ConvWeight& weight, const ConvShape& s, bool transposed, const ConvArgs& a, char* panels,
                     uint8_t* unsafe, ConvPackArgs* w);
void pack_weight(const ConvKernels& kernels, const Runner& runner, const ConvArgs& a, const ConvPackArgs& w);

// Panels, and what the kernels know of them.
struct PackedSpace {
  char* panels;
  uint8_t* unsafe;
  int64_t bytes;
  PackedSpace(Carver carver, const ConvArgs& a, const ConvTraits& traits)
      : panels(carver.take<char>(panel_bytes(a, traits))),
        unsafe(carver.take<uint8_t>(pack_items(a, traits))),
        bytes(carver.used()) {}
};

}  // namespace fused_resnet::cpu
