// Who does what: how a tensor is cut into chunks and blocks, and which groups a thread visits.
//
//   NHWC   a row is a pixel. A block is (columns x rows) threads: `columns` neighbouring groups of channels, which its
//          threads keep, times `rows` pixels at a time. Blocks side by side cover all channels.
//   NCHW   a row is a plane. A block has one channel; its threads take neighbouring (image, group) positions.
//
// A chunk is what one block walks: pixels, or positions of one channel. Chunks depend on the extent alone.
#pragma once

#include "device/vec_io.cuh"

namespace fused_resnet::cuda {

struct Tile {
  int64_t images, channels, spatial;  // of the tensor
  int64_t padded;                     // channels, rounded up to whole groups
  int64_t length, groups;             // of a row: elements, groups
  int64_t total;                      // pixels, or positions of one channel
  int64_t chunk, chunks;              // of these, and how many chunks there are
  int64_t tiles;                      // blocks beside each other: of channel groups, or channels
  int columns, rows;                  // threads (NHWC)
  int64_t step_image, step_group;     // NCHW: kThreads positions further on
  // NCHW, 4 positions further on: groups, elements and bytes of the mask; and what is added where a plane ends.
  int64_t stride_group, stride_offset, stride_byte;
  int64_t wrap_offset, wrap_byte;
  int64_t blocks() const { return tiles * chunks; }
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Steps (of all a block's threads together) per chunk: `blocks` blocks where there is enough to do; where there is
// little, up to 4 steps, as long as a few hundred blocks remain, so that partial sums stay few.
inline int64_t steps_per_chunk(int64_t steps, int64_t tiles, int64_t blocks) {
  // Blocks that an H100 runs at once, on any device: chunks, and so results, do not depend on it.
  constexpr int64_t kFewBlocks = 256, kUnroll = 4, kAtOnce = 2 * 132;
  const int64_t even = divide_up(steps * tiles, blocks);
  if (even >= kUnroll) {
    const int64_t up = divide_up(even, kUnroll) * kUnroll, down = up - kUnroll;
    // Rounds of blocks, the last of which may be nearly empty, times steps of each.
    const auto time = [&](int64_t each) { return divide_up(divide_up(steps, each) * tiles, kAtOnce) * each; };
    return blocks > kAtOnce && down > 0 && time(down) < time(up) ? down : up;
  }
  const int64_t few = divide_up(steps * tiles, kFewBlocks);
  return even > few ? even : few < kUnroll ? few : kUnroll;
}

// Constants, but not for the emulation: tensors that it can afford are a step or two of so many blocks, so its tests
// set smaller numbers too (tests/native/simt/rounds.cpp), and threads walk several rounds.
#ifdef FR_SIMT
#define FR_TARGET inline
#else
#define FR_TARGET inline constexpr
#endif
// Few, so that their partial sums are soon merged; enough for two or three rounds on the largest GPUs.
FR_TARGET int64_t kReduceBlocks = 1024;
// No sums to merge: smaller blocks share the work more evenly.
FR_TARGET int64_t kMapBlocks = 2048;
// Additions in a row in single precision.
FR_TARGET int64_t kMostSteps = 256;

// `total` pixels or positions, walked `chunk` at a time.
inline void cut(Tile& t, int64_t at_once, int64_t blocks) {
  int64_t steps = steps_per_chunk(divide_up(t.total, at_once), t.tiles, blocks);
  if (steps > kMostSteps) steps = kMostSteps;
  t.chunk = steps * at_once;
  t.chunks = divide_up(t.total, t.chunk);
}

// Columns and rows of NHWC blocks.
inline void arrange(Tile& t) {
  constexpr int64_t kMostColumns = 32;  // and so at least 8 rows
  const int64_t groups = divide_up(t.channels, kGroup);
  const int64_t share = divide_up(groups, divide_up(groups, kMostColumns));
  const int64_t columns = groups <= kMostColumns ? groups : divide_up(share, 4) * 4;
  t.columns = static_cast<int>(columns);
  t.rows = static_cast<int>(kThreads / columns);
  t.tiles = divide_up(groups, columns);
}

inline Tile make_tile(const Shape& s, int64_t blocks) {
  const bool nhwc = s.layout == Layout::kNHWC;
  Tile t = {};
  t.images = s.n;
  t.channels = s.c;
  t.padded = divide_up(s.c, kGroup) * kGroup;
  t.spatial = s.s;
  t.length = nhwc ? s.c : s.s;
  t.groups = divide_up(t.length, kGroup);
  if (nhwc) {
    arrange(t);
    t.total = s.per_channel();
    cut(t, t.rows, blocks);
  } else {
    t.columns = t.rows = 1;
    t.tiles = s.c;
    t.total = s.n * t.groups;
    t.step_image = kThreads / t.groups;
    t.step_group = kThreads % t.groups;
    const int64_t stride_image = (kWarp / kGroup) / t.groups;
    t.stride_group = (kWarp / kGroup) % t.groups;
    t.stride_offset = stride_image * s.c * t.length + t.stride_group * kGroup;
    t.stride_byte = stride_image * s.c * t.groups + t.stride_group;
    t.wrap_offset = s.c * t.length - t.groups * kGroup;
    t.wrap_byte = (s.c - 1) * t.groups;
    cut(t, kThreads, blocks);
  }
  return t;
}

// This block's chunk and its place among the blocks beside it.
struct BlockPlace {
  int64_t chunk, tile, begin, end;
  FR_DEVICE BlockPlace(const Tile& t, bool last_first) {
    const unsigned tiles = static_cast<unsigned>(t.tiles), block = blockIdx.x;
    chunk = block / tiles;
    tile = block % tiles;
    // A pass before this one left the end of its tensors in the second-level cache.
    if (last_first) chunk = t.chunks - 1 - chunk;
    begin = chunk * t.chunk;
    end = begin + t.chunk < t.total ? begin + t.chunk : t.total;
  }
};

// The row and the column of threads that a thread belongs to (NHWC), and its first channel.
template <Layout kLayout>
struct ThreadPlace {
  int64_t group;    // NHWC: of channels
  int64_t channel;  // the first one
  int column, row;
  bool active;
  FR_DEVICE ThreadPlace(const Tile& t, const BlockPlace& block) {
    if constexpr (kLayout == Layout::kNHWC) {
      column = static_cast<int>(threadIdx.x) % t.columns;
      row = static_cast<int>(threadIdx.x) / t.columns;
      group = block.tile * t.columns + column;
      channel = group * kGroup;
      active = row < t.rows && channel < t.channels;
    } else {
      column = 0;
      row = static_cast<int>(threadIdx.x);
      group = 0;
      channel = block.tile;
      active = true;
    }
  }
};

// The 8 elements a thread has come to: group `group` of row `row`.
template <Layout kLayout, bool kVector>
struct Place {
  int64_t row, group;
  bool inside;

  FR_DEVICE int count(const Tile& t) const {
    const int64_t left = t.length - group * kGroup;
    return left < kGroup ? static_cast<int>(left) : kGroup;
  }
  // Bit j: element j exists.
  FR_DEVICE uint32_t valid(const Tile& t) const { return kVector ? 0xffu : (1u << count(t)) - 1u; }
  template <class T>
  FR_DEVICE Group<T> load(const Tile& t, const T* p) const {
    return load_group<kVector>(p + offset(t), count(t));
  }
  template <class T>
  FR_DEVICE void store(const Tile& t, T* p, const Stat<T> (&v)[kGroup]) const {
    store_group<kVector>(p + offset(t), v, count(t));
  }
  FR_DEVICE uint32_t load_mask(const Tile& t, const uint8_t* mask) const { return mask[row * t.groups + group]; }
  FR_DEVICE void store_mask(const Tile& t, uint8_t* mask, uint32_t bits) const {
    mask[row * t.groups + group] = static_cast<uint8_t>(bits & valid(t));
  }

 private:
  FR_DEVICE int64_t offset(const Tile& t) const { return row * t.length + group * kGroup; }
};

// Planes that cannot move in vectors (14x14 and 7x7 in 16 bits): eight scalar accesses of 8 neighbours each would touch
// every sector eight times, and stores that often reach the second-level cache. So the 32 groups of a warp are dealt
// out like cards: thread `lane` has elements lane, lane + 32, ... of their 256, and every access of a warp is
// contiguous. Element j is in group 4 * j + lane / 8 of the warp's.
template <>
struct Place<Layout::kNCHW, false> {
  int64_t image, group, channel;  // of element 0
  int64_t position, end;          // likewise; the chunk's end
  bool inside;                    // any of the warp's: the same for the whole warp

  // f(j, offset in the tensor, byte of the mask) for elements in the tensor.
  template <class F>
  FR_DEVICE void for_elements(const Tile& t, F f) const {
    const int64_t within = threadIdx.x % kGroup, row = image * t.channels + channel;
    int64_t g = group, at = row * t.length + g * kGroup + within, byte = row * t.groups + g;
    FR_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      if (position + kStride * j < end && g * kGroup + within < t.length) f(j, at, byte);
      g += t.stride_group;
      at += t.stride_offset;
      byte += t.stride_byte;
      if (g >= t.groups) {
        g -= t.groups;
        at += t.wrap_offset;
        byte += t.wrap_byte;
      }
    }
  }
  FR_DEVICE uint32_t valid(const Tile& t) const {
    uint32_t bits = 0;
    for_elements(t, [&](int j, int64_t, int64_t) { bits |= 1u << j; });
    return bits;
  }
  template <class T>
  FR_DEVICE Group<T> load(const Tile& t, const T* p) const {
    Group<T> g = empty_group<T>();
    for_elements(t, [&](int j, int64_t at, int64_t) { put_element(g, j, p[at]); });
    return g;
  }
  template <class T>
  FR_DEVICE void store(const Tile& t, T* p, const Stat<T> (&v)[kGroup]) const {
    for_elements(t, [&](int j, int64_t at, int64_t) { p[at] = from_stat<T>(v[j]); });
  }
  FR_DEVICE uint32_t load_mask(const Tile& t, const uint8_t* mask) const {
    uint32_t bits = 0;
    for_elements(t, [&](int j, int64_t, int64_t byte) {
      bits |= (static_cast<uint32_t>(mask[byte]) >> threadIdx.x % kGroup & 1u) << j;
    });
    return bits;
  }
  // The whole warp comes here. A group's bits are its eight threads' votes.
  FR_DEVICE void store_mask(const Tile& t, uint8_t* mask, uint32_t bits) const {
    const uint32_t existing = bits & valid(t);
    uint32_t votes[kGroup];
    FR_UNROLL
    for (int j = 0; j < kGroup; ++j) votes[j] = __ballot_sync(0xffffffffu, (existing >> j & 1u) != 0);
    for_elements(t, [&](int j, int64_t, int64_t byte) {
      if (threadIdx.x % kGroup == 0) mask[byte] = static_cast<uint8_t>(votes[j] >> threadIdx.x % kWarp);
    });
  }

  static constexpr int64_t kStride = kWarp / kGroup;  // positions from one element of a thread to the next
};

template <Layout kLayout, bool kVector>
class Cursor {
  static constexpr bool kDealt = kLayout == Layout::kNCHW && !kVector;

 public:
  FR_DEVICE Cursor(const Tile& t, const BlockPlace& block, const ThreadPlace<kLayout>& thread)
      : end_(thread.active ? block.end : 0), at_(block.begin + thread.row), channel_(thread.channel) {
    if constexpr (kLayout == Layout::kNHWC) {
      group_ = thread.group;
    } else {
      if constexpr (kDealt) {
        const int lane = thread.row % kWarp;
        at_ += lane / kGroup - lane;
      }
      image_ = at_ / t.groups;
      group_ = at_ % t.groups;
    }
  }
  // Dealt: is the warp's first position?
  FR_DEVICE bool inside() const {
    if constexpr (kDealt) return at_ - static_cast<int64_t>(threadIdx.x % kWarp / kGroup) < end_;
    return at_ < end_;
  }
  FR_DEVICE Place<kLayout, kVector> place(const Tile& t) const {
    if constexpr (kDealt) {
      return {image_, group_, channel_, at_, end_, inside()};
    } else if constexpr (kLayout == Layout::kNHWC) {
      return {at_, group_, inside()};
    } else {
      return {image_ * t.channels + channel_, group_, inside()};
    }
  }
  FR_DEVICE void advance(const Tile& t) {
    if constexpr (kLayout == Layout::kNHWC) {
      at_ += t.rows;
    } else {
      at_ += kThreads;
      image_ += t.step_image;
      group_ += t.step_group;
      if (group_ >= t.groups) {
        group_ -= t.groups;
        ++image_;
      }
    }
  }

 private:
  int64_t end_, at_, channel_, group_, image_ = 0;
};

// Groups of each tensor that a thread has under way, where vectors would allow kBatch of them.
template <Layout kLayout, bool kVector, int kBatch>
inline constexpr int kBatchOf = kLayout == Layout::kNCHW && !kVector ? 1 : kBatch;

// The next kCount places. Those past the end repeat the first, so that all loads can start without asking.
template <int kCount, Layout kLayout, bool kVector>
FR_DEVICE void take_places(const Tile& t, Cursor<kLayout, kVector>& cursor, Place<kLayout, kVector> (&place)[kCount]) {
  FR_UNROLL
  for (int k = 0; k < kCount; ++k) {
    if (k == 0 || cursor.inside()) {
      place[k] = cursor.place(t);
    } else {
      place[k] = place[0];
      place[k].inside = false;
    }
    cursor.advance(t);
  }
}

// One per-channel array as a thread needs it: 8 channels (NHWC) or one (NCHW). Single precision is kept in registers;
// of doubles there would be too many: they are read again, from the first-level cache. So is what few calls need.
template <class S, Layout kLayout, bool kVector, bool kKeep = sizeof(S) == 4>
class Channels {
  static constexpr bool kKept = kLayout == Layout::kNCHW || kKeep;
  static constexpr int kCount = kLayout == Layout::kNCHW ? 1 : kGroup;

 public:
  // array null: every channel is `absent`. Vectors ask nothing of the array: where it is not aligned it is read one by
  // one, once.
  FR_DEVICE Channels(const S* array, S absent, const Tile& t, int64_t channel) {
    const int64_t left = t.channels - channel;
    last_ = left < kCount ? static_cast<int>(left) - 1 : kCount - 1;
    array_ = array == nullptr ? nullptr : array + channel;
    absent_ = absent;
    if constexpr (kKept) {
      if (array == nullptr || (kVector && last_ < 0)) {
        FR_UNROLL
        for (int j = 0; j < kCount; ++j) kept_[j] = absent;
      } else if (kVector && kCount == kGroup && reinterpret_cast<uintptr_t>(array) % 16 == 0) {
        const Group<S> g = load_group<true>(array_, kGroup);
        FR_UNROLL
        for (int j = 0; j < kCount; ++j) kept_[j] = g[j];
      } else {
        FR_UNROLL
        for (int j = 0; j < kCount; ++j) kept_[j] = kVector || j <= last_ ? array_[j] : absent;
      }
    }
  }
  FR_DEVICE S operator[](int j) const {
    if constexpr (kKept) return kept_[kCount == 1 ? 0 : j];
    return array_ == nullptr || (!kVector && j > last_) ? absent_ : array_[j];
  }

 private:
  S kept_[kKept ? kCount : 1];
  const S* array_;
  S absent_;
  int last_;
};

}  // namespace fused_resnet::cuda
