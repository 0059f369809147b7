// Few channels on tiles, whose step is 32: the columns of taps, which are neighbours in memory, become one run of
// channels with them. The run of every position is packed, so a tile sees a convolution of one column of taps. Included
// inside an unnamed namespace after pack_body.h.
#pragma once

// One row of one image, from the column of the first tap on, `columns` of them.
template <class I, class C, class O>
inline void stage_columns(const ConvArgs& g, const O& operand, int64_t image, int64_t row, int64_t first,
                          int64_t columns, C* to) {
  const int64_t c = g.a.c, line = (image * g.a.h + row) * g.a.w;
  const int64_t begin = first < 0 ? -first : 0, end = g.a.w - first < columns ? g.a.w - first : columns;
  if (begin >= end) return set_zero(to, columns * c);
  set_zero(to, begin * c);
  if (O::kCopies && operand.mask == nullptr) {
    put(to + begin * c, operand.data + (line + first + begin) * c, (end - begin) * c);
  } else {
    for (int64_t x = begin; x < end; ++x) {
      for_columns<I::kWidth>(0, c, [&](int64_t column, int64_t n) FR_INLINE {
        write<I>(to + x * c + column, operand.at(line + first + x, column, n), n);
      });
    }
  }
  set_zero(to + end * c, (columns - end) * c);
}

// [row][position][image][run], and a staged row behind it.
template <class D, class O>
inline void pack_runs(const ConvArgs& g, const Patch& p, const O& operand, typename D::C* out) {
  using C = typename D::C;
  const int64_t c = g.a.c, run = g.fold * c, pitch = p.images * g.c_padded,
                columns = (p.cols - 1) * p.col_step + g.fold;
  C* stage = out + p.rows * p.cols * pitch;
  for (int64_t y = 0; y < p.rows; ++y) {
    const int64_t row = p.row0 + y * p.row_step;
    C* line = out + y * p.cols * pitch;
    if (row < 0 || row >= g.a.h) {
      set_zero(line, p.cols * pitch);
      continue;
    }
    for (int64_t m = 0; m < p.images; ++m) {
      stage_columns<typename D::Ops>(g, operand, p.image + m, row, p.col0, columns, stage);
      for (int64_t x = 0; x < p.cols; ++x) {
        D::copy_padded(stage + x * p.col_step * c, run, g.c_padded, line + x * pitch + m * g.c_padded);
      }
    }
  }
}

// One row of taps of one panel, zero beyond the run.
template <class D, class T>
inline void pack_weight_run(const ConvPackArgs& g, const T* row, int64_t count, int64_t panel, typename D::C* to) {
  for (int64_t u = 0; u < g.fold; ++u) {
    const T* tap = row + g.col_index[u] * g.stride_col;
    for (int64_t c = 0; c < g.ins; ++c) {
      const int64_t k = u * g.ins + c;
      typename D::C* at = to + k / D::kPair * D::kPair * panel + k % D::kPair;
      for (int64_t f = 0; f < count; ++f) put(at + f * D::kPair, tap + f * g.stride_out + c * g.stride_in, 1);
    }
  }
}
