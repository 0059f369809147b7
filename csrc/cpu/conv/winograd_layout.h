// How a Winograd convolution F(4x4, 3x3) is cut, and where its parts lie. Included inside an unnamed namespace, by the
// kernels and by the driver.
#pragma once

constexpr int64_t kTileOut = 4, kTileIn = 6, kPoints = kTileIn * kTileIn;
constexpr int64_t kMostUnitTiles = 64;
constexpr int64_t kLine = 16;  // floats of a cache line
// Floats between planes: without them, planes a power of two apart would share the sets of a cache.
constexpr int64_t kSkew = 16;
// Values up to about 3e15, and weights whose squares sum to 1e30: with the transforms' own factors, at most 49 and 225
// of operands, 1 of weights, 124 and 4 of results, no sum of products overflows, of 1e4 channels or 1e4 tiles. Beyond,
// and where there is a NaN, nine taps take over.
constexpr float kOverflowing = 1e23f;  // times anything larger is infinite
constexpr double kMostSquares = 1e30;
// One item of packing is a panel and this many channels.
constexpr int64_t kPackChannels = 32;

inline int64_t whole(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// Output tiles are counted through columns, rows and images; a unit of work is a run of them.
struct TileGrid {
  int64_t down, across, all;
  explicit TileGrid(const ConvArgs& g)
      : down((g.oh + kTileOut - 1) / kTileOut), across((g.ow + kTileOut - 1) / kTileOut), all(g.a.n * down * across) {}
};

inline int64_t first_tile(const ConvArgs& g, int64_t unit) { return TileGrid(g).all * unit / g.units; }

// Tiles of a unit that stand in one row of tiles of one image.
struct TileStrip {
  int64_t image, row, col, count;
  int64_t width() const { return kTileOut * count + kTileIn - kTileOut; }  // of its input
};

// f(strip, its first tile's number in the unit)
template <class F>
inline void for_strips(const ConvArgs& g, int64_t unit, F f) {
  const TileGrid grid(g);
  const int64_t begin = first_tile(g, unit), end = first_tile(g, unit + 1);
  for (int64_t t = begin; t < end;) {
    const int64_t line = t / grid.across, col = t % grid.across;
    const int64_t count = grid.across - col < end - t ? grid.across - col : end - t;
    f(TileStrip{line / grid.down, line % grid.down, col, count}, t - begin);
    t += count;
  }
}

// Extents in floats. A thread's scratch: the lines of a strip after the first half of the input transform, the
// transformed input [point][tile][channel], and the products [point][tile][filter]. A unit that is computed directly
// has a panel of taps and the packed strip where the transformed input was.
struct WinogradLayout {
  int64_t panel, channels, block, lines, v_plane, v, m_plane, m;
  WinogradLayout(const ConvArgs& g, int64_t width) {
    const TileGrid grid(g);
    const int64_t most = grid.across < g.unit_tiles ? grid.across : g.unit_tiles;
    const int64_t pixels = kTileIn * TileStrip{0, 0, 0, most}.width();
    panel = g.vectors * width;
    channels = whole(g.a.c, width);
    block = channels < 4 * width ? channels : 4 * width;
    lines = whole(pixels * block, kSkew);
    v_plane = whole(g.unit_tiles * channels, kSkew) + kSkew;
    const int64_t direct = whole(9 * g.a.c * panel, kSkew) + pixels * g.a.c;
    v = whole(kPoints * v_plane < direct ? direct : kPoints * v_plane, kSkew);
    m_plane = whole(g.unit_tiles * panel, kSkew) + kSkew;
    m = kPoints * m_plane;
  }
  int64_t scratch() const { return lines + v + m; }
};

// One point of one panel of transformed filters.
inline int64_t weight_plane(int64_t channels, int64_t panel) { return whole(channels * panel, kSkew) + kSkew; }
inline int64_t pack_blocks(int64_t channels) { return (channels + kPackChannels - 1) / kPackChannels; }
