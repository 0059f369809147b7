// Packing the operands of the weight gradient. Included inside an unnamed namespace by weight_body.h.
#pragma once

struct Chunk {
  int64_t begin, end;  // tiles
};

// Filters are shared out evenly: tiles differ by one at most.
struct KTile {
  int64_t first, count;
  KTile(const WeightArgs& p, int64_t tile) {
    const int64_t base = p.group_k / p.k_tiles, longer = p.group_k % p.k_tiles;
    first = tile * base + min64(tile, longer);
    count = base + (tile < longer ? 1 : 0);
  }
};

// Pixels in memory, to be fetched ahead of time: `rows` times `pixels` pixels.
struct Trail {
  int64_t first, pixels, step;  // in pixels
};

// A block of output pixels.
struct Block {
  int64_t index;
  bool first_of_slice;
  int64_t image, images, row, rows, col, cols;
  int64_t runs, row_steps, steps;

  Block(const WeightArgs& p, int64_t i, int pair) : index(i) {
    const int64_t per_image = p.blocks_h * p.blocks_w;
    image = i / per_image * p.block_n;
    row = i % per_image / p.blocks_w * p.block_h;
    col = i % p.blocks_w * p.block_w;
    images = min64(p.block_n, p.dz.n - image);
    rows = min64(p.block_h, p.dz.h - row);
    cols = min64(p.block_w, p.dz.w - col);
    runs = p.pair_images ? ceil_div(images, pair) : images;
    row_steps = p.pair_images ? cols : ceil_div(cols, pair);
    steps = runs * rows * row_steps;
    const int64_t blocks = p.blocks_n * per_image, slice = ((i + 1) * p.slices - 1) / blocks;
    first_of_slice = i == blocks * slice / p.slices;
  }

  // Blocks are whole rows or parts of one row, whole images or parts of one, so that pixels follow each other; of
  // paired images that are cut only the first.
  Trail dz_trail(const WeightArgs& p) const {
    const int64_t whole = rows == p.dz.h ? images : 1;
    return {(image * p.dz.h + row) * p.dz.w + col, whole * rows * cols, 1};
  }
  // Rows that the block before had not.
  Trail a_trail(const WeightArgs& p) const {
    const int64_t reach = (p.rows - 1) * p.dilation_h;
    const int64_t begin = max64(row * p.stride_h - p.pad_h + (row > 0 ? reach : 0), 0);
    const int64_t end = min64((row + rows - 1) * p.stride_h - p.pad_h + reach + 1, p.a.h);
    const int64_t x = max64(col * p.stride_w - p.pad_w, 0);
    const int64_t step = p.cols == 1 ? p.stride_w : 1;
    if (begin >= end || x >= p.a.w) return {0, 0, 1};
    const bool whole = rows == p.dz.h;
    const int64_t wide = cols == p.dz.w ? p.a.w : min64(cols * p.stride_w, p.a.w - x);
    const int64_t pixels =
        whole ? (images - 1) * p.a.h * p.a.w + (end - begin) * p.a.w : (end - begin - 1) * p.a.w + wide;
    return {(image * p.a.h + begin) * p.a.w + x, pixels / step, step};
  }
};

// Which cache lines to fetch while a chunk is multiplied. The lines of one pixel column after another, so that every
// step of a register tile has one.
struct Ahead {
  struct Stream {
    const char* base;
    int64_t step, pixels, lines;
  };
  Stream stream[3];
  int streams = 0, current = 0;
  int64_t line = 0, pixel = 0;

  void add(const Trail& trail, int64_t first, int64_t count, int64_t channels, const void* data, int64_t size) {
    if (trail.pixels <= 0) return;
    const char* base = static_cast<const char*>(data) + (trail.first * channels + first) * size;
    Stream s{base, trail.step * channels * size, trail.pixels, (count * size + 63) / 64};
    if (s.step < 64 || (count == channels && trail.step == 1)) {  // nothing between them
      s = {base, 64, (s.step * trail.pixels + 63) / 64, 1};
    }
    stream[streams++] = s;
  }
  void next(int64_t steps, const char*& at, int64_t& step) {
    if (current == streams) {
      step = 0;
      at = reinterpret_cast<const char*>(this);
      return;
    }
    const Stream& s = stream[current];
    at = s.base + line * 64 + pixel * s.step;
    step = s.step;
    pixel += steps;
    if (pixel < s.pixels) return;
    pixel = 0;
    if (++line < s.lines) return;
    line = 0;
    ++current;
  }
};

// The packed rows of one run, by remainder of the stride.
struct PackedRows {
  int64_t base[kMaxTaps] = {};  // of tap row r's remainder
  int64_t count = 0;
  PackedRows(const WeightArgs& p, int64_t rows) {
    if (p.fold) {
      count = rows;
      return;
    }
    for_remainders(p, rows, [&](int64_t remainder, int64_t first, int64_t n) {
      for (int64_t r = 0; r < p.rows; ++r) {
        if (r * p.dilation_h % p.stride_h == remainder) base[r] = first;
      }
      count = first + n;
    });
  }
  int64_t start(const WeightArgs& p, int64_t tap_row) const {
    return base[tap_row] + tap_row * p.dilation_h / p.stride_h;
  }
  // f(remainder, first packed row, rows) of every remainder that a tap row has.
  template <class F>
  static void for_remainders(const WeightArgs& p, int64_t rows, F f) {
    int64_t first = 0;
    for (int64_t r = 0; r < p.rows; ++r) {
      const int64_t remainder = r * p.dilation_h % p.stride_h;
      int64_t reach = r * p.dilation_h / p.stride_h;
      bool seen = false;
      for (int64_t other = 0; other < p.rows; ++other) {
        if (other * p.dilation_h % p.stride_h != remainder) continue;
        seen = seen || other < r;
        reach = max64(reach, other * p.dilation_h / p.stride_h);
      }
      if (seen) continue;
      f(remainder, first, rows + reach);
      first += rows + reach;
    }
  }
};

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
                                              int64_t column, int64_t n, typename D::Unit* to, int64_t step_units) {
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
    D::pack(to + i * step_units, v[i], w[i]);
    sum = I::add(sum, v[i]);
    if constexpr (D::kPair == 2) sum = I::add(sum, w[i]);
  }
  return sum;
}

// Channels [begin, end) of some steps, `n` of a vector at most `limit - column`. place(column) is where the first
// step's vector goes; sum(column, v) has the sum over the steps.
template <class D, class Source, class Place, class Sum>
FR_INLINE inline void pack_steps(const Source source, const Steps<D>& steps, int64_t begin, int64_t end, int64_t limit,
                                 int64_t step_units, Place place, Sum sum) {
  constexpr int64_t width = D::kWidth;
  const bool whole = steps.whole;
  const int count = steps.count;
  for (int64_t column = begin; column < end; column += width) {
    typename D::Unit* to = place(column);
    int i = 0;
    if (__builtin_expect(whole && limit - column >= width, 1)) {
      if (count == kStageSteps) {
        sum(column, pack_vector<D, kStageSteps>(source, steps.pixel, steps.other, column, width, to, step_units));
        continue;
      }
      for (; i + 2 <= count; i += 2) {
        sum(column, pack_vector<D, 2>(source, steps.pixel + i, steps.other + i, column, width, to + i * step_units,
                                      step_units));
      }
    }
    for (; i < count; ++i) {
      const int64_t n = min64(limit - column, width);
      typename D::Unit* at = to + i * step_units;
      if (n == width) {
        sum(column, pack_vector<D, 1>(source, steps.pixel + i, steps.other + i, column, width, at, step_units));
      } else {
        sum(column, pack_vector<D, 1>(source, steps.pixel + i, steps.other + i, column, n, at, step_units));
      }
    }
  }
}

// dz: converted a few steps at a time, then dealt out to the tiles, whose rows are no whole vectors.
template <class D, class T>
struct PackedFilters {
  using I = typename D::I;
  using Unit = typename D::Unit;
  const WeightArgs& p;
  const Block& block;
  Chunk chunk;
  Unit *packed, *stage;
  typename I::S* bias;                         // nullable: sums of the block, from channel `first` on
  int64_t shorter, longer;                     // filters of a tile, and how many tiles have one more
  int64_t chunk_first, first, end, row_units;  // channels: of the chunk, of its vectors; of a staged step

  PackedFilters(const WeightArgs& args, const Block& b, int64_t group, const Chunk& c, Unit* to, Unit* stage_at,
                typename I::S* bias_at)
      : p(args),
        block(b),
        chunk(c),
        packed(to),
        stage(stage_at),
        bias(bias_at),
        shorter(args.group_k / args.k_tiles),
        longer(args.group_k % args.k_tiles),
        chunk_first(group * args.group_k + KTile(args, c.begin).first),
        first(chunk_first / 16 * 16),  // vectors start where mask bytes do
        end(group * args.group_k + KTile(args, c.end).first),
        row_units((end - first + 15) / 16 * 16 + kTileSlack) {}

  void run() const {
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
        operand, steps, from, end, p.dz.c, row_units, [=](int64_t column) FR_INLINE { return to + (column - from); },
        [=](int64_t column, typename I::V sum) FR_INLINE {
          if constexpr (kBias) I::store(sums + (column - from), I::add(I::load(sums + (column - from)), sum));
        });
    deal(done, steps.count);
    done += steps.count;
    steps.clear();
  }

  // Whole vectors: what is too much is overwritten by the next step, or falls into the slack.
  void deal(int64_t step, int64_t count) const {
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
  static constexpr int64_t kLanes = D::kNr * D::kWidth;
  const WeightArgs& p;
  const Block& block;
  Unit* packed;
  S* stage;
  PackedRows rows;
  int64_t first, channels, padded;    // channels of the chunk
  int64_t column_units, stage_width;  // of a tap column in a tile; columns of a staged row

  PackedChannels(const WeightArgs& args, const Block& b, int64_t group, const Chunk& chunk, Unit* to, S* stage_at)
      : p(args),
        block(b),
        packed(to),
        stage(stage_at),
        rows(args, b.rows),
        first(group * args.group_c + chunk.begin * kLanes),
        channels(min64(chunk.end * kLanes, args.group_c) - chunk.begin * kLanes),
        padded((channels + D::kWidth - 1) / D::kWidth * D::kWidth),
        column_units(b.runs * rows.count * b.row_steps * kLanes),
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
          } else {
            staged_row(operand, image, y, steps, done);
          }
        }
      });
    }
    flush(operand, first, p.a.c, steps, packed + done * kLanes);
  }

 private:
  // Channels [0, channels) of the chunk from `from` on.
  template <class Source>
  FR_INLINE void flush(const Source& source, int64_t from, int64_t limit, Steps<D>& steps, Unit* to) const {
    const int64_t tile_units = p.cols * column_units;
    pack_steps<D>(
        source, steps, from, from + channels, limit, kLanes,
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
        flush(operand, first, p.a.c, steps, packed + done * kLanes);
        done += kStageSteps;
      }
    }
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
      Unit* to = packed + s * column_units + done * kLanes;
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
          to += kStageSteps * kLanes;
        }
      }
      flush(row, 0, padded, steps, to);
    }
    done += row_steps;
  }

  template <class Op>
  void fill_stage(const Op& given, int64_t lines, S* to) const {
    const Op operand = given;
    const int64_t length = padded, from = first, count = channels, wide = p.a.w;
    const int64_t left = block.col * p.stride_w - p.pad_w, right = left + stage_width;
    for (int64_t x = left; x < right; ++x, to += length) {
      if (x < 0 || x >= wide) {
        for (int64_t column = 0; column < length; column += D::kWidth) I::store(to + column, I::zero());
        continue;
      }
      for_columns<D::kWidth>(0, count, [&](int64_t column, int64_t n) FR_INLINE {
        I::store(to + column, operand.at(lines + x, from + column, n));
      });
    }
  }
};

// `a` with few channels: all taps and channels of a step side by side, copied from staged rows.
template <class D, class T>
struct FoldedChannels {
  using I = typename D::I;
  using Unit = typename D::Unit;
  using S = typename I::S;
  const WeightArgs& p;
  const Block& block;
  Unit* packed;
  S* stage;

  template <class Op>
  void run(const Op& operand) const {
    const int64_t span = (block.rows - 1) * p.stride_h + (p.rows - 1) * p.dilation_h + 1;
    const int64_t columns = (block.cols - 1) * p.stride_w + p.cols, length = columns * p.a.c;
    const int64_t left = block.col * p.stride_w - p.pad_w;
    Unit* to = packed;
    for (int64_t run = 0; run < block.runs; ++run) {
      for (int64_t i = 0; i < span; ++i) {
        const int64_t y = block.row * p.stride_h - p.pad_h + i;
        fill(operand, block.image + run, y, left, columns, stage + i * length);
      }
      for (int64_t row = 0; row < block.rows; ++row, to += block.row_steps * p.a_step) {
        const S* from = stage + row * p.stride_h * length;
        for (int64_t r = 0; r < p.rows; ++r) {
          segments(to + r * p.cols * p.a.c, from + r * p.dilation_h * length);
        }
      }
    }
  }

 private:
  // The segment of one tap row, of all steps of a row. Tap rows come in rising order: a segment's whole vectors reach
  // into the next one's place, or behind the last.
  void segments(Unit* to, const S* from) const {
    switch (ceil_div(p.cols * p.a.c, D::kWidth)) {
      case 1:
        return segments<1>(to, from, 1);
      case 2:
        return segments<2>(to, from, 2);
      default:
        return segments<0>(to, from, ceil_div(p.cols * p.a.c, D::kWidth));
    }
  }
  template <int kVectors>
  void segments(Unit* to, const S* from, int64_t vectors) const {
    const int64_t next = p.stride_w * p.a.c, a_step = p.a_step, cols = block.cols,
                  count = kVectors > 0 ? kVectors : vectors;
    for (int64_t column = 0; column < cols; column += D::kPair, to += a_step, from += D::kPair * next) {
      const bool two = D::kPair == 2 && column + 1 < cols;
#pragma GCC unroll 2
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = i * D::kWidth;
        D::pack(to + at, I::load(from + at), two ? I::load(from + next + at) : I::zero());
      }
    }
  }

  template <class Op>
  void fill(const Op& operand, int64_t image, int64_t y, int64_t left, int64_t columns, S* to) const {
    const int64_t c = p.a.c;
    const bool inside = y >= 0 && y < p.a.h;
    const int64_t begin = inside ? min64(max64(-left, 0), columns) : columns;
    const int64_t end = max64(min64(p.a.w - left, columns), begin);
    for (int64_t i = 0; i < begin * c; ++i) to[i] = 0;
    const int64_t pixel = (image * p.a.h + y) * p.a.w + left;
    if (p.a.kind == OperandKind::kPlain) {
      const T* from = static_cast<const T*>(p.a.data) + (pixel + begin) * c;
      for_columns<I::kWidth>(0, (end - begin) * c, [&](int64_t i, int64_t n) FR_INLINE {
        write<I>(to + begin * c + i, read<I>(from + i, n), n);
      });
    } else {
      for (int64_t x = begin; x < end; ++x) write<I>(to + x * c, operand.at(pixel + x, 0, c), c);
    }
    for (int64_t i = end * c; i < columns * c; ++i) to[i] = 0;
  }
};

template <class D, class T>
void pack_a(const WeightArgs& p, const Block& block, int64_t group, const Chunk& chunk, typename D::Unit* packed,
            typename D::I::S* stage) {
  with_operand<typename D::I, T>(p.a, [&](const auto& operand) {
    if (p.fold) {
      FoldedChannels<D, T>{p, block, packed, stage}.run(operand);
    } else {
      PackedChannels<D, T>(p, block, group, chunk, packed, stage).run(operand);
    }
  });
}
