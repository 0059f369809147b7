// How a tensor is cut into chunks, and the arguments every pass shares.
#pragma once

#include <algorithm>

#include "dispatch.h"
#include "fused_resnet/batch_norm.h"
#include "parallel.h"
#include "params.h"

namespace fused_resnet::cpu {

// A chunk is the unit of summation and of scheduling: about 128 KB of floats, so
// that it stays in the second-level cache between passes; at least 64 rows, so that
// partial sums are small beside the data; at most 1024, so that single-precision
// sums stay short.
inline constexpr int64_t kChunkElements = 32768;
inline constexpr int64_t kMinChunkRows = 64;
inline constexpr int64_t kMaxChunkRows = 1024;

struct Grid {
  int64_t rows, length, chunk_rows, chunks, padded;
  explicit Grid(const Shape& s) {
    const bool nhwc = s.layout == Layout::kNHWC;
    rows = nhwc ? s.per_channel() : s.n * s.c;
    length = nhwc ? s.c : s.s;
    const int64_t fit = kChunkElements / (length > 0 ? length : 1);
    chunk_rows = nhwc ? std::clamp(fit, kMinChunkRows, kMaxChunkRows) : std::max<int64_t>(fit, 1);
    chunks = (rows + chunk_rows - 1) / chunk_rows;
    padded = padded_channels(s.c);
  }
};

inline BnArgs base_args(const Shape& s, const Grid& g) {
  BnArgs a;
  a.rows = g.rows;
  a.length = g.length;
  a.chunk_rows = g.chunk_rows;
  a.channels = s.c;
  a.channels_padded = g.padded;
  a.layout = s.layout;
  return a;
}

inline void run(BnKernel kernel, const BnArgs& a, const Grid& g, const Shape& s, const Runner& runner) {
  for_chunks(runner, g.chunks, s.numel(), [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

}  // namespace fused_resnet::cpu
