// The stem's geometry: windows and the pixels they hold, and who visits which.
//
// Window (i, j) covers rows 2i - 1 .. 2i + 1 and columns alike; tap = 3 * (row in it) + (column in it). Its *quad* is
// the 2x2 pixels (2i, 2j) .. (2i + 1, 2j + 1): quads tile the image, there are as many as windows, and a quad's pixels
// lie in windows (i, j), (i, j + 1), (i + 1, j), (i + 1, j + 1) only. So both directions walk windows:
//   NHWC   a thread takes 8 channels of one window (forward) or of its quad (backward)
//   NCHW   a thread takes 8 windows beside each other, or their quads: two rows of 16 pixels
#pragma once

#include "batch_norm/norm.cuh"
#include "device/activation.cuh"
#include "fused_resnet/pool.h"

namespace fused_resnet::cuda {

struct StemTile {
  Tile tile;                    // device/tile.cuh over windows (NHWC) or groups of 8 windows (NCHW)
  int64_t h, w, oh, ow;         // of the image, of the pooled image
  int64_t units;                // in a row of windows: windows, or groups of them
  int64_t step_row, step_unit;  // what one step of the block adds to (image, row, unit); images: tile.step_image
};

inline StemTile make_stem_tile(const Shape& s, int64_t h, int64_t w, int64_t blocks) {
  const bool nhwc = s.layout == Layout::kNHWC;
  StemTile stem = {};
  Tile& t = stem.tile;
  t = make_tile(s, blocks);
  stem.h = h;
  stem.w = w;
  stem.oh = stem_pool_extent(h);
  stem.ow = stem_pool_extent(w);
  stem.units = nhwc ? stem.ow : divide_up(stem.ow, kGroup);
  t.total = s.n * stem.oh * stem.units;
  const int64_t at_once = nhwc ? t.rows : kThreads;
  cut(t, at_once, blocks);
  t.step_image = at_once / (stem.oh * stem.units);
  stem.step_row = at_once / stem.units % stem.oh;
  stem.step_unit = at_once % stem.units;
  return stem;
}

// The window (NHWC) or the first of 8 windows (NCHW) that a thread has come to.
template <Layout kLayout>
class StemCursor {
 public:
  int64_t image, row, column;

  FR_DEVICE StemCursor(const StemTile& s, const BlockPlace& block, const ThreadPlace<kLayout>& thread)
      : end_(thread.active ? block.end : 0), at_(block.begin + thread.row), channel_(thread.channel) {
    const int64_t line = at_ / s.units;
    unit_ = at_ % s.units;
    image = line / s.oh;
    row = line % s.oh;
    column = unit_ * kWidth;
  }
  FR_DEVICE bool inside() const { return at_ < end_; }
  FR_DEVICE void advance(const StemTile& s) {
    at_ += kLayout == Layout::kNHWC ? s.tile.rows : kThreads;
    image += s.tile.step_image;
    row += s.step_row;
    unit_ += s.step_unit;
    if (unit_ >= s.units) {
      unit_ -= s.units;
      ++row;
    }
    if (row >= s.oh) {
      row -= s.oh;
      ++image;
    }
    column = unit_ * kWidth;
  }
  // Offsets of pixel (i, j) of this image and channel in an image of extent (h, w).
  FR_DEVICE int64_t offset(const StemTile& s, int64_t h, int64_t w, int64_t i, int64_t j) const {
    if constexpr (kLayout == Layout::kNHWC) return ((image * h + i) * w + j) * s.tile.channels + channel_;
    return ((image * s.tile.channels + channel_) * h + i) * w + j;
  }
  FR_DEVICE int64_t in(const StemTile& s, int64_t i, int64_t j) const { return offset(s, s.h, s.w, i, j); }
  FR_DEVICE int64_t out(const StemTile& s, int64_t i, int64_t j) const { return offset(s, s.oh, s.ow, i, j); }

 private:
  static constexpr int64_t kWidth = kLayout == Layout::kNHWC ? 1 : kGroup;
  int64_t end_, at_, channel_, unit_;
};

FR_DEVICE int64_t clamp_to(int64_t value, int64_t last) { return value < 0 ? 0 : value > last ? last : value; }

// At most a group.
FR_DEVICE int group_count(int64_t left) { return left >= kGroup ? kGroup : left < 0 ? 0 : static_cast<int>(left); }

}  // namespace fused_resnet::cuda
