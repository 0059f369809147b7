// Statistics of chunks: shift k, sum (x - k), sum (x - k)^2 per channel.
//
// Mapping: device/tile.cuh. Each thread sums differences from its own first value (NHWC) or the mean of its first group
// (NCHW), so no square cancels however large |mean| / std is, and no thread waits for another before its loads. Then
// the block agrees on one shift per channel, the mean of up to 8 threads' but for the largest and the smallest (NHWC)
// or of all (NCHW), rounded to T, moves its threads' sums to it, and adds them in a fixed order. The shift is a value
// of T: differences of coarse numbers (bf16, fp16) have few bits and add up nearly exactly. Sums are in the stat dtype,
// at most kMostSteps * 8 terms a thread; finalize.cuh merges chunks in double.
// Partials: [chunk][kStatSums][padded channels]. Reads x once.
#pragma once

#include "device/reduce.cuh"

namespace fused_resnet::cuda {

inline constexpr int kStatSums = 3;

template <class T>
struct StatsArgs {
  Tile tile;
  const T* x;
  Stat<T>* partials;
};

// The mean of the values whose bit is set, exactly that value where all are equal; rounded to T.
template <class T>
FR_DEVICE Stat<T> mean_of(const Stat<T> (&v)[kGroup], uint32_t valid) {
  using S = Stat<T>;
  S first = 0, sum = 0, count = 0;
  FR_UNROLL
  for (int j = kGroup - 1; j >= 0; --j) {
    if ((valid >> j & 1u) != 0) first = v[j];
  }
  FR_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    if ((valid >> j & 1u) == 0) continue;
    sum += v[j] - first;
    count += 1;
  }
  return count > 0 ? to_stat(from_stat<T>(first + sum / count)) : S(0);
}

// Sums of `count` differences from k, moved to the shift k - delta.
template <class S>
FR_DEVICE void move_sums(S delta, S count, S& sum, S& square) {
  square = fma(delta, fma(count, delta, sum + sum), square);
  sum = fma(count, delta, sum);
}

// The mean of the first `count` values but for the largest and the smallest: one that lies far out would move the mean
// of 8 by an eighth of its distance, and the squares of all others with it. Exactly that value where all are equal.
template <class T>
FR_DEVICE Stat<T> middle_mean_of(const Stat<T> (&v)[kGroup], int count) {
  using S = Stat<T>;
  S sum = 0, low = 0, high = 0;  // relative to the first
  FR_UNROLL
  for (int j = 1; j < kGroup; ++j) {
    if (j >= count) continue;
    const S d = v[j] - v[0];
    sum += d;
    low = d < low ? d : low;
    high = d > high ? d : high;
  }
  const S middle = count > 2 ? (sum - low - high) / static_cast<S>(count - 2) : sum / static_cast<S>(count);
  return to_stat(from_stat<T>(v[0] + middle));
}

// NHWC: brings each channel of the block to one shift, of up to 8 threads' evenly spread over its rows. The first 8
// rows of threads find it for one of their column's channels each: all, in every thread, cost as much as 15 pixels.
template <class T>
FR_DEVICE void agree_on_shift(const Tile& t, const BlockPlace& block, const ThreadPlace<Layout::kNHWC>& thread,
                              int count, const Stat<T> (&shift)[kGroup], Stat<T> (&sum)[kGroup],
                              Stat<T> (&square)[kGroup], Stat<T>* out) {
  using S = Stat<T>;
  S* const shared = reinterpret_cast<S*>(dynamic_shared());
  const SharedRows at(t);
  const int64_t walked = block.end - block.begin;
  const int rows = walked < at.rows ? static_cast<int>(walked) : at.rows;  // those that have seen values
  const int samples = rows < kGroup ? rows : kGroup, stride = rows / samples;
  const int first = thread.column * kGroup;
  if (count > 0) {
    FR_UNROLL
    for (int j = 0; j < kGroup; ++j) shared[at.slot(thread.row, first + j)] = shift[j];
  }
  __syncthreads();
  if (thread.active && thread.row < kGroup) {
    S sample[kGroup];
    FR_UNROLL
    for (int i = 0; i < kGroup; ++i) sample[i] = shared[at.slot(i < samples ? i * stride : 0, first + thread.row)];
    const S common = middle_mean_of<T>(sample, samples);
    shared[at.slot(at.rows, first + thread.row)] = common;
    if (thread.channel + thread.row < t.channels) out[thread.channel + thread.row] = common;
  }
  __syncthreads();
  if (count == 0) return;
  FR_UNROLL
  for (int j = 0; j < kGroup; ++j) {
    move_sums(shift[j] - shared[at.slot(at.rows, first + j)], static_cast<S>(count), sum[j], square[j]);
  }
}

// NCHW: the block's one channel, the mean of all threads'. The result is the shift.
template <class T>
FR_DEVICE Stat<T> agree_on_shift(int count, Stat<T> shift, Stat<T>& sum, Stat<T>& square) {
  using S = Stat<T>;
  S* const shared = reinterpret_cast<S*>(dynamic_shared());
  if (threadIdx.x == 0) shared[0] = shift;  // it has seen the chunk's first value
  __syncthreads();
  const S first = shared[0];
  const S offset = sum_block(count > 0 ? shift - first : S(0)), threads = sum_block(count > 0 ? S(1) : S(0));
  const S common = to_stat(from_stat<T>(first + offset / threads));
  if (count > 0) move_sums(shift - common, static_cast<S>(count), sum, square);
  return common;
}

// Blocks that share a multiprocessor: three where elements are dealt out, with one group each under way.
template <class T, Layout kLayout, bool kVector>
inline constexpr int kStatsBlocks = kLayout == Layout::kNCHW && !kVector && sizeof(T) <= 4 ? 3 : 2;

template <class T, Layout kLayout, bool kVector>
__global__ void __launch_bounds__(kThreads, kStatsBlocks<T, kLayout, kVector>) stats_kernel(StatsArgs<T> a) {
  using S = Stat<T>;
  constexpr bool kNhwc = kLayout == Layout::kNHWC;
  constexpr int kInVectors = sizeof(T) == 8 ? 2 : 4, kBatch = kBatchOf<kLayout, kVector, kInVectors>;
  const Tile& t = a.tile;
  const BlockPlace block(t, false);
  const ThreadPlace<kLayout> thread(t, block);
  Cursor<kLayout, kVector> cursor(t, block, thread);

  S shift[kGroup] = {}, sum[kGroup] = {}, square[kGroup] = {};
  int count = 0;  // of values: per channel (NHWC), or of all of them
  if (cursor.inside()) {
    const Place<kLayout, kVector> place = cursor.place(t);
    const Group<T> x = place.load(t, a.x);
    FR_UNROLL
    for (int j = 0; j < kGroup; ++j) shift[j] = x[j];
    if constexpr (!kNhwc) shift[0] = mean_of<T>(shift, place.valid(t));
  }
  while (cursor.inside()) {
    Place<kLayout, kVector> place[kBatch];
    Group<T> x[kBatch];
    take_places(t, cursor, place);
    FR_UNROLL
    for (int k = 0; k < kBatch; ++k) x[k] = place[k].load(t, a.x);
    FR_UNROLL
    for (int k = 0; k < kBatch; ++k) {
      if (!place[k].inside) continue;
      const uint32_t valid = place[k].valid(t);
      FR_UNROLL
      for (int j = 0; j < kGroup; ++j) {
        if (!kVector && (valid >> j & 1u) == 0) continue;
        const S d = x[k][j] - shift[kNhwc ? j : 0];
        sum[j] += d;
        square[j] = fma(d, d, square[j]);
        if (!kNhwc || j == 0) ++count;
      }
    }
  }

  S* const out = a.partials + block.chunk * kStatSums * t.padded;
  if constexpr (kNhwc) {
    agree_on_shift<T>(t, block, thread, count, shift, sum, square, out);
    store_sums<S, kLayout>(t, block, thread, sum, out + t.padded);
    store_sums<S, kLayout>(t, block, thread, square, out + 2 * t.padded);
  } else {
    S one = sum_group(sum), two = sum_group(square);
    const S common = agree_on_shift<T>(count, shift[0], one, two);
    one = sum_block(one);
    two = sum_block(two);
    if (threadIdx.x == 0) {
      out[thread.channel] = common;
      out[thread.channel + t.padded] = one;
      out[thread.channel + 2 * t.padded] = two;
    }
  }
}

}  // namespace fused_resnet::cuda
