// Gradient sums of chunks, merged in double and in chunk order.
#pragma once

#include "kernels.h"

namespace fused_resnet::cpu {

inline constexpr int64_t kMergeChannels = 64;

// Sums of up to kMergeChannels neighbouring channels.
struct MergedSums {
  double sum[kSums][kMergeChannels];
};

// Partials of stat dtype S, [chunk][kSums][padded]: contiguous in the channel.
template <class S>
void merge_by_channel(const S* partials, int64_t chunks, int64_t padded, int64_t channel, int64_t count,
                      MergedSums* out) {
  *out = {};
  for (int64_t k = 0; k < chunks; ++k) {
    for (int row = 0; row < kSums; ++row) {
      const S* p = partials + (k * kSums + row) * padded + channel;
      for (int64_t i = 0; i < count; ++i) out->sum[row][i] += static_cast<double>(p[i]);
    }
  }
}

// Partials double, [image][channel][chunk][kSums].
inline void merge_by_plane(const double* partials, int64_t images, int64_t channels, int64_t chunks_per_plane,
                           int64_t channel, int64_t count, MergedSums* out) {
  *out = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t n = 0; n < images; ++n) {
      const double* p = partials + (n * channels + channel + i) * chunks_per_plane * kSums;
      for (int64_t k = 0; k < chunks_per_plane; ++k) {
        for (int row = 0; row < kSums; ++row) out->sum[row][i] += p[k * kSums + row];
      }
    }
  }
}

}  // namespace fused_resnet::cpu
