// Sums over a block, in a fixed order: the same bits in every run.
#pragma once

#include "device/tile.cuh"

namespace fused_resnet::cuda {

// Shared memory of NHWC reductions: the block's values of all 8 * columns channels, row by row, and one more row.
// An odd pitch keeps threads that read neighbouring channels off each other's banks.
struct SharedRows {
  int columns, rows, pitch;
  FR_DEVICE explicit SharedRows(const Tile& t) : columns(t.columns), rows(t.rows), pitch(t.columns | 1) {}
  FR_DEVICE int slot(int row, int channel) const {
    return (row * kGroup + channel % kGroup) * pitch + channel / kGroup;
  }
};

inline int64_t reduce_shared_bytes(const Tile& t, int64_t stat_bytes) {
  const int64_t values = static_cast<int64_t>(t.rows + 1) * kGroup * (t.columns | 1);
  return (values > kThreads ? values : kThreads) * stat_bytes;
}

// NHWC: out[channel] = sum over the block's rows of threads. Every thread must come; `v` of inactive ones is 0.
// First each thread adds about 8 rows of one channel, then one thread per channel adds those sums.
template <class S>
FR_DEVICE void sum_rows(const Tile& t, const BlockPlace& block, const ThreadPlace<Layout::kNHWC>& thread,
                        const S (&v)[kGroup], S* out) {
  S* const shared = reinterpret_cast<S*>(dynamic_shared());
  const SharedRows at(t);
  const int width = at.columns * kGroup, lanes = kThreads / width < 1 ? 1 : kThreads / width;
  const int channel = static_cast<int>(threadIdx.x) % width, lane = static_cast<int>(threadIdx.x) / width;
  __syncthreads();  // whoever read before has finished
  if (thread.row < at.rows) {
    FR_UNROLL
    for (int j = 0; j < kGroup; ++j) shared[at.slot(thread.row, thread.column * kGroup + j)] = v[j];
  }
  __syncthreads();
  S sum = 0;
  if (lane < lanes) {
    for (int row = lane; row < at.rows; row += lanes) sum += shared[at.slot(row, channel)];
  }
  if (lanes > 1) {
    __syncthreads();
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (lane == 0) {
      for (int i = 1; i < lanes; ++i) sum += shared[i * width + channel];
    }
  }
  const int64_t first = block.tile * width;
  if (lane == 0 && first + channel < t.channels) out[first + channel] = sum;
}

// The sum over a block, in every thread.
template <class S>
FR_DEVICE S sum_block(S v) {
  constexpr int kWarps = kThreads / kWarp;
  S* const shared = reinterpret_cast<S*>(dynamic_shared());
  FR_UNROLL
  for (int distance = kWarp / 2; distance > 0; distance /= 2) v += __shfl_xor_sync(0xffffffffu, v, distance);
  __syncthreads();  // whoever read before has finished
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = v;
  __syncthreads();
  S sum = 0;
  FR_UNROLL
  for (int i = 0; i < kWarps; ++i) sum += shared[i];
  return sum;
}

template <class S>
FR_DEVICE S sum_group(const S (&v)[kGroup]) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// out[channel] = the block's sum: of v[j] per channel (NHWC), or of all v (NCHW).
template <class S, Layout kLayout>
FR_DEVICE void store_sums(const Tile& t, const BlockPlace& block, const ThreadPlace<kLayout>& thread,
                          const S (&v)[kGroup], S* out) {
  if constexpr (kLayout == Layout::kNHWC) {
    sum_rows(t, block, thread, v, out);
  } else {
    const S sum = sum_block(sum_group(v));
    if (threadIdx.x == 0) out[block.tile] = sum;
  }
}

}  // namespace fused_resnet::cuda
