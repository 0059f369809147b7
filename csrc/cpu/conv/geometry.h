// How a convolution is cut into units of work for the kernels of one instruction set.
#pragma once

#include "conv/kernels.h"
#include "fused_resnet/conv.h"

namespace fused_resnet::cpu {

// The forward pass, without tensors.
ConvArgs forward_geometry(const ConvShape& s, const ConvTraits& traits);

// The data gradient is one convolution of dy for each residue of the input's rows and columns by the stride, some of
// them without any tap. `pack` says which taps of the weight each takes.
struct BackwardDataPart {
  ConvArgs args;
  ConvPackArgs pack;
};
int64_t backward_data_parts(const ConvShape& s);
BackwardDataPart backward_data_geometry(const ConvShape& s, const ConvTraits& traits, int64_t part);

// Whether steps of AMX, 32 channels each, would be worth taking: not where groups straddle them, or where few channels
// cannot be filled up with columns of taps.
bool fills_tiles(const ConvShape& s, int64_t channels);

// How many bfloat16 parts a pass splits floats into, of those that `numerics` allows.
int conv_split(const ConvShape& s, const ConvNumerics& numerics);
int weight_split(const ConvShape& s, const ConvNumerics& numerics);

// Whether a vector of this many filters holds several whole groups.
bool groups_share_vectors(const ConvShape& s, int64_t width);

// After the operand is known: whether it can be read in place.
void settle(ConvArgs* a, const ConvTraits& traits);

// Whether an operand that could be read in place is faster packed: for `splits` that stand.
bool better_packed(const ConvArgs& a, const ConvTraits& traits);

int64_t scratch_bytes(const ConvArgs& a, const ConvTraits& traits);  // for one thread
int64_t panel_count(const ConvArgs& a, const ConvTraits& traits);
int64_t pack_items(const ConvArgs& a, const ConvTraits& traits);   // what a pack kernel's range counts
int64_t panel_bytes(const ConvArgs& a, const ConvTraits& traits);  // of all panels
int64_t unit_positions(const ConvArgs& a, int64_t unit);

}  // namespace fused_resnet::cpu
