// Whether a convolution goes through Winograd's F(4x4, 3x3), and how it is then cut.
#pragma once

#include "conv/geometry.h"

namespace fused_resnet::cpu {

// From a convolution as geometry.h cuts it. The decision is the shape's alone.
bool winograd_pays(const ConvArgs& a, double direct_speed, bool packed);
void cut_winograd(ConvArgs* a, const ConvTraits& traits);

// As their namesakes of geometry.h, for what cut_winograd() has cut.
int64_t winograd_scratch_bytes(const ConvArgs& a, const ConvTraits& traits);
int64_t winograd_panel_bytes(const ConvArgs& a, const ConvTraits& traits);
int64_t winograd_unit_positions(const ConvArgs& a, int64_t unit);
int64_t winograd_pack_items(const ConvArgs& a, const ConvTraits& traits);

}  // namespace fused_resnet::cpu
