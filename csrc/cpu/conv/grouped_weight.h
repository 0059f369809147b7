// The weight gradient of groups that share a vector: a lane is a filter, and sums dz times each channel of its own
// group. Operands of a block are packed as planes, a chunk of vectors at once. Included inside an unnamed namespace
// after the vector headers.
#pragma once

#include "conv/grouped_pack.h"
#include "conv/slices.h"

// One tap row of one vector of filters over a block.
template <class I>
struct GroupedWeightTile {
  using S = typename I::S;
  const S *a, *dz;
  int64_t rows, cols;            // of dz
  int64_t a_row, a_step, a_tap;  // elements of `a` from one row, column and tap to the next
  int64_t dz_row;
  int64_t group;
  const int32_t* lanes;
};

// Sums [tap column][channel][lane] of kCols columns and kChannels channels from `channel` on.
template <class I, int kCols, int kChannels>
inline void sum_products(const GroupedWeightTile<I>& t, int64_t channel, bool first, typename I::S* sums) {
  using V = typename I::V;
  constexpr int64_t kWidth = I::kWidth;
  V sum[kCols][kChannels];
  decltype(I::load_lanes(t.lanes)) lanes[kChannels];
#pragma GCC unroll 4
  for (int c = 0; c < kChannels; ++c) lanes[c] = I::load_lanes(t.lanes + (channel + c) * kWidth);
  typename I::S* to = sums + channel * kWidth;
#pragma GCC unroll 4
  for (int u = 0; u < kCols; ++u) {
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) sum[u][c] = I::zero();
  }
  for (int64_t j = 0; j < t.rows; ++j) {
    const typename I::S *a = t.a + j * t.a_row, *dz = t.dz + j * t.dz_row;
    for (int64_t i = 0; i < t.cols; ++i, a += t.a_step, dz += kWidth) {
      const V d = I::load(dz);
#pragma GCC unroll 4
      for (int u = 0; u < kCols; ++u) {
        const V v = I::load(a + u * t.a_tap);
#pragma GCC unroll 4
        for (int c = 0; c < kChannels; ++c) sum[u][c] = I::fma(I::permute(v, lanes[c]), d, sum[u][c]);
      }
    }
  }
#pragma GCC unroll 4
  for (int u = 0; u < kCols; ++u) {
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) {
      typename I::S* at = to + (u * t.group + c) * kWidth;
      I::store(at, first ? sum[u][c] : I::add(I::load(at), sum[u][c]));
    }
  }
}

template <class I, int kCols>
inline void sum_channels(const GroupedWeightTile<I>& t, bool first, typename I::S* sums) {
  if (t.group == 1) return sum_products<I, kCols, 1>(t, 0, first, sums);
  if (t.group == 2) return sum_products<I, kCols, 2>(t, 0, first, sums);
  for (int64_t c = 0; c < t.group; c += 4) sum_products<I, kCols, 4>(t, c, first, sums);
}

// One part of the vectors of filters, over the blocks of one slice.
template <class I, class T>
struct GroupedWeight {
  using S = typename I::S;
  static constexpr int64_t kWidth = I::kWidth;
  const WeightArgs& p;
  char* scratch;
  const GroupLanes<kWidth> lanes;

  GroupedWeight(const WeightArgs& args, void* memory)
      : p(args), scratch(static_cast<char*>(memory)), lanes(args.group_c) {}

  int64_t vectors() const { return (p.dz.c + kWidth - 1) / kWidth; }
  int64_t vector_sums() const { return p.rows * p.cols * p.group_c * kWidth; }

  void accumulate(int64_t begin, int64_t end) const {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t slice = item / p.k_parts, part = item % p.k_parts, blocks = p.blocks_n * p.blocks_h * p.blocks_w;
      const int64_t first = blocks * slice / p.slices, last = blocks * (slice + 1) / p.slices;
      for (int64_t block = first; block < last; ++block) {
        const int64_t stop = vectors() * (part + 1) / p.k_parts;
        for (int64_t v = vectors() * part / p.k_parts; v < stop; v += p.chunk_k) {
          add_block(slice, block, v, v + p.chunk_k < stop ? v + p.chunk_k : stop, block == first);
        }
      }
    }
  }

  // Vectors [begin, end) of filters, to the caller's strides and dtype.
  template <class Out>
  void finish(int64_t begin, int64_t end) const {
    const int64_t slice = vectors() * vector_sums();
    for (int64_t v = begin; v < end; ++v) {
      const S* sums = static_cast<const S*>(p.sums) + v * vector_sums();
      const int64_t filters = p.dz.c - v * kWidth < kWidth ? p.dz.c - v * kWidth : kWidth;
      Out* out = static_cast<Out*>(p.dweight) + v * kWidth * p.out_k;
      for (int64_t t = 0; t < p.rows; ++t) {
        for (int64_t u = 0; u < p.cols; ++u) {
          for (int64_t c = 0; c < p.group_c; ++c, sums += kWidth) {
            Out lane[kWidth];
            I::store(lane, sum_slices<I>(sums, p.slices, slice));
            Out* to = out + t * p.out_r + u * p.out_s + c * p.out_c;
            for (int64_t i = 0; i < filters; ++i) to[i * p.out_k] = lane[i];
          }
        }
      }
    }
  }

 private:
  void add_block(int64_t slice, int64_t block, int64_t begin, int64_t end, bool first) const {
    const int64_t i0 = block % p.blocks_w * p.block_w, j0 = block / p.blocks_w % p.blocks_h * p.block_h;
    Patch y{}, x{};
    y.images = x.images = 1;
    y.image = x.image = block / p.blocks_w / p.blocks_h;
    y.row_step = y.col_step = x.row_step = x.col_step = 1;
    y.row0 = j0;
    y.col0 = i0;
    y.rows = p.dz.h - j0 < p.block_h ? p.dz.h - j0 : p.block_h;
    y.cols = p.dz.w - i0 < p.block_w ? p.dz.w - i0 : p.block_w;
    x.row0 = j0 * p.stride_h - p.pad_h;
    x.col0 = i0 * p.stride_w - p.pad_w;
    x.rows = (y.rows - 1) * p.stride_h + (p.rows - 1) * p.dilation_h + 1;
    x.cols = (y.cols - 1) * p.stride_w + (p.cols - 1) * p.dilation_w + 1;
    const Planes<I, S> a(x, scratch + p.a_at), dz(y, scratch + p.dz_at);
    const int64_t c1 = end * kWidth < p.dz.c ? end * kWidth : p.dz.c;
    with_operand<I, T>(p.a, [&](const auto& operand) { pack_planes(p.a, x, begin * kWidth, c1, operand, a); });
    with_operand<I, T>(p.dz, [&](const auto& operand) { pack_planes(p.dz, y, begin * kWidth, c1, operand, dz); });

    GroupedWeightTile<I> tile{};
    tile.rows = y.rows;
    tile.cols = y.cols;
    tile.a_row = p.stride_h * a.line;
    tile.a_step = p.stride_w * kWidth;
    tile.a_tap = p.dilation_w * kWidth;
    tile.dz_row = dz.line;
    tile.group = p.group_c;
    tile.lanes = lanes.lanes;
    for (int64_t v = begin; v < end; ++v) {
      S* sums = static_cast<S*>(p.sums) + (slice * vectors() + v) * vector_sums();
      tile.dz = dz.data + (v - begin) * dz.plane;
      for (int64_t t = 0; t < p.rows; ++t) {
        tile.a = a.data + (v - begin) * a.plane + t * p.dilation_h * a.line;
        const int cols = p.cols % 3 == 0 ? 3 : 1;
        for (int64_t u = 0; u < p.cols; u += cols, sums += cols * p.group_c * kWidth) {
          cols == 3 ? sum_channels<I, 3>(tile, first, sums) : sum_channels<I, 1>(tile, first, sums);
          tile.a += cols * tile.a_tap;
        }
      }
      if (p.bias_sums != nullptr) add_bias(tile.dz, y, slice * p.dz.c + v * kWidth, c1 - v * kWidth, first);
    }
  }

  void add_bias(const S* from, const Patch& y, int64_t at, int64_t count, bool first) const {
    auto sum = I::zero();
    for (int64_t i = 0; i < y.rows * y.cols; ++i) sum = I::add(sum, I::load(from + i * kWidth));
    S lane[kWidth];
    I::store(lane, sum);
    for (int64_t i = 0; i < kWidth && i < count; ++i) {
      p.bias_sums[at + i] = (first ? 0.0 : p.bias_sums[at + i]) + static_cast<double>(lane[i]);
    }
  }
};

template <class I, class T>
inline void grouped_weight_gradient(const WeightArgs& p, int64_t begin, int64_t end, void* scratch) {
  const GroupedWeight<I, T> work(p, scratch);
  if (p.pass == WeightPass::kAccumulate) return work.accumulate(begin, end);
  if constexpr (sizeof(T) == 2) {
    if (p.float_dweight) return work.template finish<float>(begin, end);
  }
  work.template finish<T>(begin, end);
}
