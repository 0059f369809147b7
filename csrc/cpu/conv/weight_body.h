// The weight gradient of a convolution, once for every instruction set and dtype. weight_kernels.h says what is what.
//
// Packed operands of one block and chunk, in units:
//   dz  [k tile][step][filters of the tile], with groups of steps [k tile][group][part][filter][step of the group]
//   a   [c tile][tap column][run][row][step of a row][part][channels of a tile], rows with what all tap rows need of
//       them
//   a   [step][tap row, tap column, channel], when taps are folded into channels
// A tap column has its own copy, which holds just the positions that its outputs meet; tap rows share theirs: with
// stride s, input rows of equal remainder stand together, so that a tap row's rows are contiguous from where it starts.
//
// Included inside an unnamed namespace after the vector headers.
#pragma once

#include "conv/operand_body.h"
#include "conv/slices.h"

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#include "conv/weight_fold.h"
#include "conv/weight_tile.h"

// Which of `parts` equal ranges of `count`.
struct Range {
  int64_t begin, end;
  Range(int64_t count, int64_t parts, int64_t index) : begin(count * index / parts), end(count * (index + 1) / parts) {}
  int64_t size() const { return end - begin; }
};

// One item: the sums of a slice for some tiles of a group.
template <class D, class T>
struct Accumulate {
  using Unit = typename D::Unit;
  using S = typename D::I::S;
  const WeightArgs& p;
  typename D::State& state;
  char* scratch;
  int64_t slice, group;
  Range k_part, c_part;
  bool with_bias;
  typename D::Seen &seen_a, &seen_dz;

  // A call before this one had other blocks of the slice.
  bool goes_on() const { return p.first_block > p.slice_begin[slice]; }

  void run() const {
    const int64_t slice_first = p.slice_begin[slice], slice_end = p.slice_begin[slice + 1];
    const int64_t first = max64(slice_first, p.first_block), last = min64(slice_end, p.last_block);
    const int64_t k_chunks = ceil_div(k_part.size(), p.chunk_k), c_chunks = ceil_div(c_part.size(), p.chunk_c);
    for (int64_t index = first; index < last; ++index) {
      const Block block(p, index, D::kPair);
      for (int64_t i = 0; i < k_chunks; ++i) {
        const Range k(k_part.size(), k_chunks, i);
        const Chunk k_chunk{k_part.begin + k.begin, k_part.begin + k.end};
        pack_filters(block, k_chunk, index == slice_first);
        for (int64_t j = 0; j < c_chunks; ++j) {
          const Range c(c_part.size(), c_chunks, j);
          const Chunk c_chunk{c_part.begin + c.begin, c_part.begin + c.end};
          pack_a<D, T>(p, block, group, c_chunk, unit(p.a_at), stage(), seen_a);
          Ahead ahead = what_follows(block, index + 1 < slice_end, i, k_chunks, j, c_chunks);
          multiply(block, k_chunk, c_chunk, index == slice_first, ahead);
        }
      }
    }
  }

 private:
  Unit* unit(int64_t at) const { return reinterpret_cast<Unit*>(scratch + at); }
  S* stage() const { return reinterpret_cast<S*>(scratch + p.stage_at); }

  void pack_filters(const Block& block, const Chunk& chunk, bool first_of_slice) const {
    S* bias = with_bias ? reinterpret_cast<S*>(scratch + p.bias_at) : nullptr;
    const PackedFilters<D, T> pack(p, block, group, chunk, unit(p.dz_at), unit(p.stage_at), bias, seen_dz);
    pack.run();
    if (bias == nullptr) return;
    double* sums = p.bias_sums + (slice * p.groups + group) * p.group_k;
    const int64_t first = KTile(p, chunk.begin).first, last = KTile(p, chunk.end).first;
    const int64_t skip = group * p.group_k + first - pack.first;
    for (int64_t k = first; k < last; ++k) {
      const double value = static_cast<double>(bias[skip + k - first]);
      sums[k] = first_of_slice ? value : sums[k] + value;
    }
  }

  // What the next chunk will be packed from.
  Ahead what_follows(const Block& block, bool more_blocks, int64_t i, int64_t k_chunks, int64_t j,
                     int64_t c_chunks) const {
    Ahead ahead;
    const bool same_filters = j + 1 < c_chunks, same_block = same_filters || i + 1 < k_chunks;
    if (!same_block && !more_blocks) return ahead;
    const Block next = same_block ? block : Block(p, block.index + 1, D::kPair);
    if (!same_filters && p.dz_ahead) {
      const int64_t which = same_block ? i + 1 : 0;
      const Range k(k_part.size(), k_chunks, which);
      const int64_t first = KTile(p, k_part.begin + k.begin).first, last = KTile(p, k_part.begin + k.end).first;
      ahead.add(next.dz_trail(p), group * p.group_k + first, last - first, p.dz.c, p.dz.data, sizeof(T));
      if (p.dz.z != nullptr) {
        ahead.add(next.dz_trail(p), group * p.group_k + first, last - first, p.dz.c, p.dz.z, sizeof(T));
      }
    }
    const Range c(c_part.size(), c_chunks, same_filters ? j + 1 : 0);
    const int64_t lanes = D::kNr * D::kWidth, first = p.fold ? 0 : (c_part.begin + c.begin) * lanes;
    const int64_t last = p.fold ? p.group_c : min64((c_part.begin + c.end) * lanes, p.group_c);
    ahead.add(next.a_trail(p), group * p.group_c + first, last - first, p.a.c, p.a.data, sizeof(T));
    return ahead;
  }

  void multiply(const Block& block, const Chunk& k_chunk, const Chunk& c_chunk, bool first, Ahead& ahead) const {
    constexpr int64_t lanes = D::kNr * D::kWidth;
    const PackedRows rows(p, block.rows);
    const PackedSteps packed(p, block, D::kGroup);
    const int64_t column_units = block.runs * rows.count * block.row_steps * p.a_step;
    S* sums = static_cast<S*>(p.sums) + (slice * p.groups + group) * p.taps * p.c_tiles * p.group_k * lanes;
    Tile<D> t;
    t.a_step = p.a_step;
    t.runs = packed.runs;
    t.steps = packed.steps;
    t.a_run = rows.count * block.row_steps * p.a_step;
    t.first = first;
    const int64_t first_filter = KTile(p, k_chunk.begin).first;
    const auto sums_of = [&](int64_t c, int64_t tap, int64_t k) FR_INLINE {
      return sums + ((tap * p.c_tiles + c) * p.group_k + KTile(p, k).first) * lanes;
    };
    for (int64_t c = c_chunk.begin; c < c_chunk.end; ++c) {
      const int vectors = static_cast<int>(min64(ceil_div(p.tile_c - c * lanes, D::kWidth), D::kNr));
      for (int64_t tap = 0; tap < p.taps; ++tap) {
        const int64_t tap_row = p.fold ? 0 : tap / p.cols, tap_col = p.fold ? 0 : tap % p.cols;
        t.a = p.fold ? unit(p.a_at) + c * lanes
                     : unit(p.a_at) + ((c - c_chunk.begin) * p.cols + tap_col) * column_units +
                           rows.start(p, tap_row) * block.row_steps * p.a_step;
        for (int64_t k = k_chunk.begin; k < k_chunk.end; ++k) {
          const KTile tile(p, k);
          t.dz =
              unit(p.dz_at) + (tile.first - first_filter) * packed.all() * D::kParts + (k - k_chunk.begin) * kTileSlack;
          t.sums = sums_of(c, tap, k);
          if constexpr (D::kGroup > 1) {
            const bool last_k = k + 1 == k_chunk.end, last_tap = tap + 1 == p.taps;
            const int64_t next_c = !(last_k && last_tap) ? c : c + 1 < c_chunk.end ? c + 1 : c_chunk.begin;
            const int64_t next_tap = !last_k ? tap : last_tap ? 0 : tap + 1, next_k = last_k ? k_chunk.begin : k + 1;
            t.next_sums = reinterpret_cast<const char*>(sums_of(next_c, next_tap, next_k));
          }
          ahead.next(block.steps, t.ahead, t.ahead_step);
          if constexpr (D::kGroup > 1) {
            D::multiply(state, tile.count, vectors, t);
          } else {
            tile_kernel<D>(static_cast<int>(tile.count), vectors)(t);
          }
        }
      }
    }
  }
};

template <class D, class T>
void accumulate(const WeightArgs& p, int64_t begin, int64_t end, char* scratch) {
  typename D::State state;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t c_part = item % p.c_parts, k_part = item / p.c_parts % p.k_parts;
    const int64_t outer = item / p.c_parts / p.k_parts;
    typename D::Seen seen_a, seen_dz;
    const Accumulate<D, T> work{p,
                                state,
                                scratch,
                                outer / p.groups,
                                outer % p.groups,
                                Range(p.k_tiles, p.k_parts, k_part),
                                Range(p.c_tiles, p.c_parts, c_part),
                                p.bias_sums != nullptr && c_part == 0,
                                seen_a,
                                seen_dz};
    work.run();
    if constexpr (D::kParts > 1) {
      uint8_t* known = p.unsafe + 2 * item;
      const bool goes_on = work.goes_on();
      known[0] = static_cast<uint8_t>(max64(seen_a.smallness(), goes_on ? known[0] : 0));
      known[1] = static_cast<uint8_t>(max64(seen_dz.smallness(), goes_on ? known[1] : 0));
    }
  }
}

// Filters [begin, end) of all groups, to the caller's strides and dtype.
template <class D, class T>
void finish(const WeightArgs& p, int64_t begin, int64_t end, void* scratch) {
  using I = typename D::I;
  using S = typename I::S;
  constexpr int64_t lanes = D::kNr * D::kWidth;
  const int64_t group_units = p.taps * p.c_tiles * p.group_k * lanes, slice_units = p.groups * group_units;
  const bool joined = p.fold && p.out_c == 1 && p.out_s == p.group_c && p.out_r == p.cols * p.group_c;
  const bool direct = p.fold ? joined : p.out_c == 1;
  T* const stage = static_cast<T*>(scratch);
  for (int64_t tile = 0; tile < p.c_tiles; ++tile) {
    const int64_t first = tile * lanes, count = min64(lanes, p.tile_c - first);
    for (int64_t k = begin; k < end; ++k) {
      T* out = static_cast<T*>(p.dweight) + k * p.out_k;
      for (int64_t tap = 0; tap < p.taps; ++tap) {
        const S* sums = static_cast<const S*>(p.sums) + k / p.group_k * group_units +
                        ((tap * p.c_tiles + tile) * p.group_k + k % p.group_k) * lanes;
        T* row = out + (p.fold ? 0 : tap / p.cols * p.out_r + tap % p.cols * p.out_s);
        T* to = direct ? row + first : stage;
        for_columns<I::kWidth>(0, count, [&](int64_t column, int64_t n) FR_INLINE {
          write<I>(to + column, sum_slices<I>(sums + column, p.slices, slice_units), n);
        });
        if (direct) continue;
        if (p.fold) {
          for (int64_t lane = 0; lane < count; ++lane) {
            const int64_t c = (first + lane) % p.group_c, at = (first + lane) / p.group_c;
            row[c * p.out_c + at / p.cols * p.out_r + at % p.cols * p.out_s] = stage[lane];
          }
        } else {
          T* at = row + first * p.out_c;
          const int64_t stride = p.out_c;
          for (int64_t lane = 0; lane < count; ++lane) at[lane * stride] = stage[lane];
        }
      }
    }
  }
}

template <class D, class T>
void weight_gradient(const WeightArgs& p, int64_t begin, int64_t end, void* scratch) {
  if (p.pass == WeightPass::kFinish) {
    if constexpr (sizeof(T) == 2) {
      if (p.float_dweight) return finish<D, float>(p, begin, end, scratch);
    }
    return finish<D, T>(p, begin, end, scratch);
  }
  accumulate<D, T>(p, begin, end, static_cast<char*>(scratch));
}
