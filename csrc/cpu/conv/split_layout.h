// Floats as sums of bfloat16: how a convolution's operands lie then. Included inside an unnamed namespace, by the
// kernels and by the driver. Source: docs/convolution.md.
#pragma once

constexpr int64_t kSplitStep = 32;   // channels
constexpr int64_t kSplitChain = 16;  // steps that are added up in the tiles
// A weight's part that stays in the second-level cache while the tiles of a unit pass by.
constexpr int64_t kSplitBlockBytes = 192 * 1024;

// The smallness of some floats is the least s >= 0 for which none but zeros is below 2^-s in magnitude. Tiles take
// denormals, of operands and of sums, for zero: what they lose is below a float's rounding where the smallnesses of two
// factors add up to this at most, so that the products of their parts are normal too.
constexpr int kMostSmallness = 100;
// The smallness of floats among which one is not finite, or so large that products may overflow: never to be split.
constexpr int kNotSplittable = 255;
constexpr uint32_t kMostExponent = 127 + 50;

// Weights are [panel][step of taps and channels][part][pair of channels][filter][2]. A thread's scratch: sums of
// panels, sums of products where a panel is taken in blocks of steps, and for a unit that cannot be split a panel of
// floats; last the patch of the operand, [part][row][column][image][channel] or of floats.
struct SplitLayout {
  int64_t panel, panels, steps, block_steps, step_size;  // step_size: elements
  int64_t partial, whole, patch;                         // bytes before each

  SplitLayout(const ConvArgs& g, int64_t width) {
    const auto up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    panel = g.vectors * width;
    panels = up(g.k, panel);
    steps = g.rows * g.cols * g.group_c / kSplitStep;
    step_size = g.split * kSplitStep * panel;
    const int64_t blocks = up(steps * step_size * 2, kSplitBlockBytes);
    block_steps = blocks > 1 ? up(up(steps, blocks), kSplitChain) * kSplitChain : steps;
    const int64_t positions = g.images * g.block_h * g.block_w;
    partial = panels * kPanelSumsBytes;
    whole = partial + (blocks > 1 ? positions * panel * 4 : 0);
    patch = whole + up(g.rows * g.cols * g.a.c * panel * 4, 64) * 64;
  }
};
