// Packing the operands of the weight gradient. Included inside an unnamed namespace by weight_body.h.
#pragma once

#include "conv/weight_block.h"

// The next few steps to pack: where their pixels are, -1 for zeros.
template <class D>
struct Steps {
  int64_t pixel[kStageSteps], other[kStageSteps];
  int count = 0;
  bool whole = true;  // no zeros
  void add(int64_t first, int64_t second) {
    pixel[count] = first;
    other[count++] = second;
    whole = whole && first >= 0 && (D::kPair == 1 || second >= 0);
  }
  bool full() const { return count == kStageSteps; }
  void clear() {
    count = 0;
    whole = true;
  }
};

// One vector of kSteps steps. All are read before the first is written: parameters of the channels are then read once.
template <class D, int kSteps, class Source>
FR_INLINE inline typename D::I::V pack_vector(const Source& source, const int64_t* pixel, const int64_t* other,
                                              int64_t column, int64_t n, typename D::Unit* to, int64_t step_units,
                                              int64_t part_units, typename D::Seen& seen) {
  using I = typename D::I;
  typename I::V v[kSteps], w[kSteps];
#pragma GCC unroll 8
  for (int i = 0; i < kSteps; ++i) {
    v[i] = w[i] = I::zero();
    if (kSteps > 1 || pixel[i] >= 0) v[i] = source.at(pixel[i], column, n);
    if constexpr (D::kPair == 2) {
      if (kSteps > 1 || other[i] >= 0) w[i] = source.at(other[i], column, n);
    }
  }
  auto sum = I::zero();
#pragma GCC unroll 8
  for (int i = 0; i < kSteps; ++i) {
    D::pack(to + i * step_units, v[i], w[i], part_units);
    seen.add(v[i]);
    if constexpr (D::kPair == 2) seen.add(w[i]);
    sum = I::add(sum, v[i]);
    if constexpr (D::kPair == 2) sum = I::add(sum, w[i]);
  }
  return sum;
}

// Channels [begin, end) of some steps, `n` of a vector at most `limit - column`. place(column) is where the first
// step's vector goes; sum(column, v) has the sum over the steps. `part_units`: from one part of a step to the next.
template <class D, class Source, class Place, class Sum>
FR_INLINE inline void pack_steps(const Source source, const Steps<D>& steps, int64_t begin, int64_t end, int64_t limit,
                                 int64_t part_units, typename D::Seen& seen, Place place, Sum sum) {
  constexpr int64_t width = D::kWidth;
  const int64_t step_units = part_units * D::kParts;
  const bool whole = steps.whole;
  const int count = steps.count;
  typename D::Seen mine = seen;  // where stores of vectors cannot change it
  for (int64_t column = begin; column < end; column += width) {
    typename D::Unit* to = place(column);
    int i = 0;
    if (__builtin_expect(whole && limit - column >= width, 1)) {
      if (count == kStageSteps) {
        if constexpr (requires { source.prefetch(0, 0); }) {
          if (column % (2 * width) == 0) {
            for (int s = 0; s < kStageSteps; ++s) {
              source.prefetch(steps.pixel[s] + kStageSteps * D::kPair, column);
              if constexpr (D::kPair == 2) source.prefetch(steps.other[s] + kStageSteps * D::kPair, column);
            }
          }
        }
        sum(column, pack_vector<D, kStageSteps>(source, steps.pixel, steps.other, column, width, to, step_units,
                                                part_units, mine));
        continue;
      }
      for (; i + 2 <= count; i += 2) {
        sum(column, pack_vector<D, 2>(source, steps.pixel + i, steps.other + i, column, width, to + i * step_units,
                                      step_units, part_units, mine));
      }
    }
    for (; i < count; ++i) {
      const int64_t n = min64(limit - column, width);
      typename D::Unit* at = to + i * step_units;
      if (n == width) {
        sum(column, pack_vector<D, 1>(source, steps.pixel + i, steps.other + i, column, width, at, step_units,
                                      part_units, mine));
      } else {
        sum(column,
            pack_vector<D, 1>(source, steps.pixel + i, steps.other + i, column, n, at, step_units, part_units, mine));
      }
    }
  }
  seen = mine;
}

// dz: converted a few steps at a time, then dealt out to the tiles, whose rows are no whole vectors.
template <class D, class T>
struct PackedFilters {
  using I = typename D::I;
  using Unit = typename D::Unit;
  const WeightArgs& p;
  const Block& block;
  const PackedSteps layout;
  Chunk chunk;
  Unit *packed, *stage;
  typename I::S* bias;                         // nullable: sums of the block, from channel `first` on
  int64_t shorter, longer;                     // filters of a tile, and how many tiles have one more
  int64_t chunk_first, first, end, row_units;  // channels: of the chunk, of its vectors; of a staged step's part
  typename D::Seen& seen;

  PackedFilters(const WeightArgs& args, const Block& b, int64_t group, const Chunk& c, Unit* to, Unit* stage_at,
                typename I::S* bias_at, typename D::Seen& all_seen)
      : p(args),
        block(b),
        layout(args, b, D::kGroup),
        chunk(c),
        packed(to),
        stage(stage_at),
        bias(bias_at),
        shorter(args.group_k / args.k_tiles),
        longer(args.group_k % args.k_tiles),
        chunk_first(group * args.group_k + KTile(args, c.begin).first),
        first(chunk_first / 16 * 16),  // vectors start where mask bytes do
        end(group * args.group_k + KTile(args, c.end).first),
        row_units((end - first + 15) / 16 * 16 + kTileSlack),
        seen(all_seen) {}

  void run() const {
    if constexpr (D::kGroup > 1) fill_up();
    with_operand<I, T>(p.dz, [&](const auto& operand) {
      if (bias != nullptr) {
        for (int64_t i = 0; i < row_units - kTileSlack; ++i) bias[i] = 0;
        walk<true>(operand);
      } else {
        walk<false>(operand);
      }
    });
  }

 private:
  template <bool kBias, class Op>
  void walk(const Op& operand) const {
    const int64_t plane = p.dz.h * p.dz.w;
    const bool pair_images = p.pair_images;
    const Block b = block;
    Steps<D> steps;
    int64_t done = 0;
    for (int64_t run = 0; run < b.runs; ++run) {
      const int64_t image = b.image + run * (pair_images ? D::kPair : 1);
      for (int64_t row = 0; row < b.rows; ++row) {
        const int64_t line = (image * p.dz.h + b.row + row) * p.dz.w + b.col;
        for (int64_t i = 0; i < b.row_steps; ++i) {
          if (D::kPair == 1) {
            steps.add(line + i, -1);
          } else if (pair_images) {
            steps.add(line + i, image + 1 < p.dz.n ? line + i + plane : -1);
          } else {
            steps.add(line + 2 * i, 2 * i + 1 < b.cols ? line + 2 * i + 1 : -1);
          }
          if (steps.full()) flush<kBias>(operand, steps, done);
        }
      }
    }
    flush<kBias>(operand, steps, done);
  }

  template <bool kBias, class Op>
  FR_INLINE void flush(const Op& operand, Steps<D>& steps, int64_t& done) const {
    Unit* to = stage;
    typename I::S* sums = bias;
    const int64_t from = first;
    pack_steps<D>(
        operand, steps, from, end, p.dz.c, row_units, seen,
        [=](int64_t column) FR_INLINE { return to + (column - from); },
        [=](int64_t column, typename I::V sum) FR_INLINE {
          if constexpr (kBias) I::store(sums + (column - from), I::add(I::load(sums + (column - from)), sum));
        });
    deal(done, steps.count);
    done += steps.count;
    steps.clear();
  }

  // Whole vectors: what is too much is overwritten by the next step, or falls into the slack.
  void deal(int64_t step, int64_t count) const {
    if constexpr (D::kGroup > 1) return deal_groups(step, count);
    const Unit* from = stage + chunk_first - first;
    Unit* to = packed;
    const int64_t block_steps = block.steps, stride = row_units, few = shorter, last = chunk.end, more = longer;
    for (int64_t k = chunk.begin; k < last; ++k) {
      const int64_t filters = few + (k < more ? 1 : 0);
      Unit* at = to + step * filters;
      for (int64_t i = 0; i < count; ++i) {
        for (int j = 0; j < D::kMr; j += D::kWidth) D::store(at + i * filters + j, D::load(from + i * stride + j));
      }
      from += filters;
      to += block_steps * filters + kTileSlack;
    }
  }

  // f(first unit, filters) for every tile.
  template <class F>
  void for_tiles(F f) const {
    Unit* to = packed;
    for (int64_t k = chunk.begin; k < chunk.end; ++k) {
      const int64_t filters = shorter + (k < longer ? 1 : 0);
      f(to, filters);
      to += layout.all() * filters * D::kParts + kTileSlack;
    }
  }
  // [group][part][filter][step of the group]
  void deal_groups(int64_t step, int64_t count) const {
    const Unit* from = stage + chunk_first - first;
    for_tiles([&](Unit* to, int64_t filters) {
      for (int64_t i = 0; i < count;) {
        const auto [at, follow] = layout.place(step + i);
        const int64_t place = at % D::kGroup;
        Unit* group = to + (at - place) * filters * D::kParts + place;
        const int64_t together = min64(min64(count - i, follow), D::kGroup - place);
        for (int part = 0; part < D::kParts; ++part, group += D::kGroup * filters) {
          D::turn(from + (i * D::kParts + part) * row_units, D::kParts * row_units, together, filters, group);
        }
        i += together;
      }
      from += filters;
    });
  }
  void fill_up() const {
    if (layout.filled() == layout.all()) return;
    for_tiles([&](Unit* to, int64_t filters) {
      const int64_t size = D::kGroup * filters * D::kParts, all = layout.all() * filters * D::kParts;
      __builtin_memset(to + all - size, 0, static_cast<uint64_t>(size) * sizeof(Unit));
    });
  }
};

// A row of the operand that has been converted: its pixels are columns.
template <class I>
struct StagedRow {
  const typename I::S* row;
  int64_t length;
  FR_INLINE typename I::V at(int64_t x, int64_t column, int64_t) const { return I::load(row + x * length + column); }
};

// `a`, one c tile after another. The transform is done once for all tap columns: through a staged input row.
template <class D, class T>
struct PackedChannels {
  using I = typename D::I;
  using Unit = typename D::Unit;
  using S = typename I::S;
  static constexpr int64_t kLanes = D::kNr * D::kWidth, kStep = kLanes * D::kParts;
  const WeightArgs& p;
  const Block& block;
  Unit* packed;
  S* stage;
  typename D::Seen& seen;
  PackedRows rows;
  int64_t first, channels, padded;    // channels of the chunk
  int64_t column_units, stage_width;  // of a tap column in a tile; columns of a staged row

  PackedChannels(const WeightArgs& args, const Block& b, int64_t group, const Chunk& chunk, Unit* to, S* stage_at,
                 typename D::Seen& all_seen)
      : p(args),
        block(b),
        packed(to),
        stage(stage_at),
        seen(all_seen),
        rows(args, b.rows),
        first(group * args.group_c + chunk.begin * kLanes),
        channels(min64(chunk.end * kLanes, args.group_c) - chunk.begin * kLanes),
        padded((channels + D::kWidth - 1) / D::kWidth * D::kWidth),
        column_units(b.runs * rows.count * b.row_steps * kStep),
        stage_width((b.cols - 1) * args.stride_w + (args.cols - 1) * args.dilation_w + 1) {}

  template <class Op>
  void run(const Op& operand) const {
    int64_t done = 0;
    Steps<D> steps;
    for (int64_t run = 0; run < block.runs; ++run) {
      const int64_t image = block.image + run * (p.pair_images ? D::kPair : 1);
      PackedRows::for_remainders(p, block.rows, [&](int64_t remainder, int64_t, int64_t n) {
        for (int64_t i = 0; i < n; ++i) {
          const int64_t y = (block.row + i) * p.stride_h + remainder - p.pad_h;
          if (p.cols == 1) {
            direct_row(operand, image, y, steps, done);
          } else if constexpr (D::kPair == 2 && D::kParts == 1) {
            rounded_row(operand, image, y, done);
          } else {
            staged_row(operand, image, y, steps, done);
          }
        }
      });
    }
    flush(operand, first, p.a.c, steps, packed + done * kStep);
  }

 private:
  // Channels [0, channels) of the chunk from `from` on.
  template <class Source>
  FR_INLINE void flush(const Source& source, int64_t from, int64_t limit, Steps<D>& steps, Unit* to) const {
    const int64_t tile_units = p.cols * column_units;
    pack_steps<D>(
        source, steps, from, from + channels, limit, kLanes, seen,
        [=](int64_t column) FR_INLINE { return to + (column - from) / kLanes * tile_units + (column - from) % kLanes; },
        [](int64_t, typename I::V) FR_INLINE {});
    steps.clear();
  }

  template <class Op>
  void direct_row(const Op& operand, int64_t image, int64_t y, Steps<D>& steps, int64_t& done) const {
    const int64_t lines = (image * p.a.h + y) * p.a.w, next_image = p.a.h * p.a.w, stride = p.stride_w;
    const int64_t left = block.col * stride - p.pad_w, wide = p.a.w, cols = block.cols, row_steps = block.row_steps;
    const bool inside = y >= 0 && y < p.a.h, pair_images = p.pair_images, two = image + 1 < p.a.n;
    for (int64_t i = 0; i < row_steps; ++i) {
      const int64_t column = D::kPair == 1 || pair_images ? i : 2 * i;
      const int64_t x = left + column * stride, x2 = x + stride;
      const int64_t pixel = inside && x >= 0 && x < wide ? lines + x : -1;
      int64_t other = -1;
      if (pair_images) {
        if (two && pixel >= 0) other = pixel + next_image;
      } else if (inside && x2 >= 0 && x2 < wide && column + 1 < cols) {
        other = lines + x2;
      }
      steps.add(pixel, other);
      if (steps.full()) {
        flush(operand, first, p.a.c, steps, packed + done * kStep);
        done += kStageSteps;
      }
    }
  }

  // Pairs of bfloat16: rounded once, [vector of channels][image of a pair][column], which makes neighbours one load.
  template <class Op>
  void rounded_row(const Op& operand, int64_t image, int64_t y, int64_t& done) const {
    constexpr int64_t kWidth = D::kWidth;
    const int64_t lines = (image * p.a.h + y) * p.a.w, stride = p.stride_w, row_steps = block.row_steps;
    const bool inside = y >= 0 && y < p.a.h, pair_images = p.pair_images, two = pair_images && image + 1 < p.a.n;
    const int64_t row = stage_width * kWidth, vector = pair_images ? 2 * row : row;
    uint16_t* const rounded = reinterpret_cast<uint16_t*>(stage);
    if (inside) {
      fill_rounded(operand, lines, rounded, vector);
      if (two) fill_rounded(operand, lines + p.a.h * p.a.w, rounded + row, vector);
    }
    const int64_t between = pair_images ? stride : 2 * stride;  // steps, in columns
    const int64_t whole = !inside ? 0 : pair_images ? (two ? row_steps : 0) : block.cols / 2;
    const int64_t second = (pair_images ? stage_width : stride) * kWidth;
    for (int64_t column = 0; column < padded; column += kWidth) {
      Unit* tile = packed + column / kLanes * p.cols * column_units + done * kStep + column % kLanes;
      for (int64_t s = 0; s < p.cols; ++s, tile += column_units) {
        const uint16_t* from = rounded + column / kWidth * vector + s * p.dilation_w * kWidth;
        Unit* to = tile;
        int64_t i = 0;
        if (second == kWidth) {
          for (; i < whole; ++i, from += between * kWidth, to += kStep) D::store(to, D::neighbours(from));
        } else {
          for (; i < whole; ++i, from += between * kWidth, to += kStep) D::store(to, D::pair(from, from + second));
        }
        for (; i < row_steps; ++i, from += between * kWidth, to += kStep) {
          D::store(to, inside ? D::alone(from) : D::none());
        }
      }
    }
    done += row_steps;
  }

  template <class Op>
  void staged_row(const Op& operand, int64_t image, int64_t y, Steps<D>& steps, int64_t& done) const {
    const int64_t lines = (image * p.a.h + y) * p.a.w, stride = p.stride_w, row_steps = block.row_steps;
    const bool inside = y >= 0 && y < p.a.h, pair_images = p.pair_images, two = pair_images && image + 1 < p.a.n;
    const int64_t second = stage_width;
    if (inside) {
      fill_stage(operand, lines, stage);
      if (two) fill_stage(operand, lines + p.a.h * p.a.w, stage + second * padded);
    }
    const StagedRow<I> row{stage, padded};
    for (int64_t s = 0; s < p.cols; ++s) {
      Unit* to = packed + s * column_units + done * kStep;
      const int64_t shift = s * p.dilation_w, cols = block.cols;
      for (int64_t i = 0; i < row_steps; ++i) {
        const int64_t column = D::kPair == 1 || pair_images ? i : 2 * i, x = column * stride + shift;
        if (!inside) {
          steps.add(-1, -1);
        } else if (pair_images) {
          steps.add(x, two ? x + second : -1);
        } else {
          steps.add(x, column + 1 < cols ? x + stride : -1);
        }
        if (steps.full()) {
          flush(row, 0, padded, steps, to);
          to += kStageSteps * kStep;
        }
      }
      flush(row, 0, padded, steps, to);
    }
    done += row_steps;
  }

  // put(column of the row, channel of the chunk, values) for all that the tap columns meet.
  template <class Op, class Put>
  FR_INLINE void stage_row(const Op& given, int64_t lines, Put put) const {
    const Op operand = given;
    const int64_t left = block.col * p.stride_w - p.pad_w, wide = p.a.w, from = first, count = channels;
    for (int64_t i = 0; i < stage_width; ++i) {
      const int64_t x = left + i;
      const bool inside = x >= 0 && x < wide;
      for_columns<D::kWidth>(0, count, [&](int64_t column, int64_t n) FR_INLINE {
        put(i, column, inside ? operand.at(lines + x, from + column, n) : I::zero());
      });
    }
  }
  template <class Op>
  void fill_stage(const Op& operand, int64_t lines, S* to) const {
    const int64_t length = padded;
    stage_row(operand, lines,
              [=](int64_t i, int64_t column, typename I::V v) FR_INLINE { I::store(to + i * length + column, v); });
  }
  template <class Op>
  void fill_rounded(const Op& operand, int64_t lines, uint16_t* to, int64_t vector) const {
    stage_row(operand, lines, [=](int64_t i, int64_t column, typename I::V v) FR_INLINE {
      D::store_rounded(to + column / D::kWidth * vector + i * D::kWidth, v);
    });
  }
};
