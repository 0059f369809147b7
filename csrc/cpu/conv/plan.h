// Which kernels compute a pass, and how it is cut for them.
#pragma once

#include "conv/geometry.h"
#include "dispatch.h"
#include "fused_resnet/conv.h"

namespace fused_resnet::cpu {

// One part of a pass without what it is applied to. A forward pass has one, a data gradient backward_data_parts().
struct PartPlan {
  ConvArgs args;
  ConvPackArgs taps;  // of the weight, that this part takes
  ConvKernels kernels;

  const ConvTraits& traits() const { return kernels.traits; }
};
PartPlan plan_part(const ConvShape& s, ConvDirection direction, const ConvNumerics& numerics, int64_t part = 0);

inline PartPlan plan_forward(const ConvShape& s, const ConvNumerics& numerics, bool packed) {
  return plan_part(s, packed ? ConvDirection::kForwardPacked : ConvDirection::kForward, numerics);
}

// Whether a pass can run at all.
Status check_problem(const ConvShape& s);

}  // namespace fused_resnet::cpu
