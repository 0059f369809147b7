// Packing the operand of a weight gradient that has few channels. Included inside an unnamed namespace by
// weight_body.h.
#pragma once

#include "conv/weight_pack.h"

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
        D::pack(to + at, I::load(from + at), two ? I::load(from + next + at) : I::zero(), 0);
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
            typename D::I::S* stage, typename D::Seen& seen) {
  with_operand<typename D::I, T>(p.a, [&](const auto& operand) {
    if constexpr (D::kParts == 1) {
      if (p.fold) return FoldedChannels<D, T>{p, block, packed, stage}.run(operand);
    }
    PackedChannels<D, T>(p, block, group, chunk, packed, stage, seen).run(operand);
  });
}
