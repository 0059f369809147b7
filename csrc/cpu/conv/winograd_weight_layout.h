// How the Winograd weight gradient is cut, and where its parts lie. Included inside an unnamed namespace, by the
// kernels and by the plan, after winograd_layout.h.
#pragma once

// The forward convolution whose weight's gradient is wanted; a unit is a chunk of tiles.
inline ConvArgs winograd_forward(const WeightArgs& p) {
  ConvArgs g;
  g.a = p.a;
  g.rows = g.cols = 3;
  for (int t = 0; t < 3; ++t) {
    g.row_tap[t] = t - p.pad_h;
    g.col_tap[t] = t - p.pad_w;
  }
  g.oh = p.dz.h;
  g.ow = p.dz.w;
  g.k = p.group_k;
  g.unit_tiles = p.unit_tiles;
  g.units = p.units;
  return g;
}

// Filters of k tile `i`, of all: they differ by one at most.
inline int64_t first_filter(const WeightArgs& p, int64_t i) { return p.group_k * i / p.k_tiles; }

// Extents in floats. A thread's scratch, of an item's channels and filters: the lines of a strip after the first half
// of a transform, the transformed input [point][tile][channel] and gradient [point][tile][filter], a block of products,
// and a chunk's sums of the gradient.
//   block   [point][filter of a k tile][channel of a panel]: what one register tile sums, for all points
struct WinogradWeightLayout {
  WinogradLayout input;  // as the forward kernel has it, but for the distance of tiles and points
  int64_t panel, panels, filters, gradient_block, k_pitch, u_plane, block;
  WinogradWeightLayout(const WeightArgs& p, const ConvArgs& g, int64_t width, int64_t tile)
      : input(g, width), panel(2 * width), filters(tile) {
    panels = (p.group_c + panel - 1) / panel;
    // A line more than a power of two: tiles would share the sets of a cache.
    input.channels = (panels + p.c_parts - 1) / p.c_parts * panel + kLine;
    input.v_plane = whole(p.unit_tiles * input.channels, kSkew) + kSkew;
    input.v = kPoints * input.v_plane;
    gradient_block = 4 * width;
    // Parts begin and end with whole vectors, so up to two more.
    const int64_t most_filters = (p.k_tiles + p.k_parts - 1) / p.k_parts * ((p.group_k + p.k_tiles - 1) / p.k_tiles);
    k_pitch = whole(most_filters, width) + 2 * width + kLine;
    u_plane = whole(p.unit_tiles * k_pitch, kSkew) + kSkew;
    const int64_t across = TileGrid(g).across, most = across < p.unit_tiles ? across : p.unit_tiles;
    const int64_t lines = whole(kTileIn * kTileOut * most * gradient_block, kSkew);
    if (input.lines < lines) input.lines = lines;
    block = kPoints * filters * panel;
  }
  int64_t scratch() const { return input.lines + input.v + kPoints * u_plane + block + k_pitch; }
};
