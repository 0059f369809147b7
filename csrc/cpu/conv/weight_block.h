// What a block of the weight gradient is: its pixels, tiles and rows. Included inside an unnamed namespace by
// weight_body.h.
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

// How the steps of a block stand in a packed tile of dz. A kernel that takes a group of steps at once has whole groups
// of each run, where the same steps of `a` are no single run; then what is left of all runs, one after another, in
// groups of which only the last is filled up with zeros.
struct PackedSteps {
  int64_t runs, steps, whole, group;  // steps: of a run, `whole` of them in groups of its own
  PackedSteps(const WeightArgs& p, const Block& block, int64_t group_steps)
      : runs(block.runs), steps(block.steps), group(group_steps) {
    if (PackedRows(p, block.rows).count == block.rows) {
      runs = 1;
    } else {
      steps /= runs;
    }
    whole = steps / group * group;
  }
  int64_t rest() const { return steps - whole; }
  int64_t filled() const { return runs * steps; }
  int64_t all() const { return (filled() + group - 1) / group * group; }
  // Where step `i` of all runs' stands, and how many follow it there.
  struct Place {
    int64_t at, together;
  };
  Place place(int64_t i) const {
    const int64_t run = i / steps, at = i % steps;
    if (at < whole) return {run * whole + at, whole - at};
    return {runs * whole + run * rest() + at - whole, steps - at};
  }
};
