// A convolution of the seam, run: threads, workspace, what the process allows, and the plan where somebody wants to
// read it.
#pragma once

#include "bindings/plan.h"
#include "fused_resnet/conv.h"

namespace fused_resnet::bindings {

void run(const Execution& on, const char* op, ConvForward& p);
void run(const Execution& on, const char* op, ConvBackwardData& p);
void run(const Execution& on, const char* op, ConvBackwardWeight& p);
// Both gradients of one convolution.
void run(const Execution& on, const char* op, ConvBackwardData& p, ConvBackwardWeight& q);

}  // namespace fused_resnet::bindings
