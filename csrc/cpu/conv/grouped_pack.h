// Operand and weights of groups that share a vector. Included inside an unnamed namespace after the vector headers.
#pragma once

#include "conv/pack_body.h"

// A patch as planes: [vector of channels][row][column][image][lane].
template <class I, class C>
struct Planes {
  C* data = nullptr;
  int64_t line = 0, plane = 0;  // elements of a row, and from one plane to the next

  Planes() = default;
  // An odd number of vectors: equal pixels of several planes do not meet in one set of a cache.
  Planes(const Patch& p, void* memory)
      : data(static_cast<C*>(memory)),
        line(p.cols * p.images * I::kWidth),
        plane(((p.rows * p.cols * p.images) | 1) * I::kWidth) {}
};

// Channels [begin, end) of a patch of the operand `a`; `begin` is a multiple of the width.
template <class I, class C, class O>
inline void pack_planes(const ConvOperand& a, const Patch& p, int64_t begin, int64_t end, const O& operand,
                        const Planes<I, C>& to) {
  const int64_t planes = (end - begin + I::kWidth - 1) / I::kWidth, pixel = p.images * I::kWidth;
  const auto clear = [&](C* first, int64_t count) {
    for (int64_t i = 0; i < planes; ++i) set_zero(first + i * to.plane, count);
  };
  for (int64_t y = 0; y < p.rows; ++y) {
    const int64_t row = p.row0 + y * p.row_step;
    C* line = to.data + y * to.line;
    if (row < 0 || row >= a.h) {
      clear(line, to.line);
      continue;
    }
    for (int64_t x = 0; x < p.cols; ++x) {
      const int64_t col = p.col0 + x * p.col_step;
      if (col < 0 || col >= a.w) {
        clear(line + x * pixel, pixel);
        continue;
      }
      for (int64_t m = 0; m < p.images; ++m) {
        const int64_t at = ((p.image + m) * a.h + row) * a.w + col;
        C* vector = line + x * pixel + m * I::kWidth;
        for_columns<I::kWidth>(begin, end, [&](int64_t column, int64_t n) FR_INLINE {
          I::store(vector, operand.at(at, column, n));
          vector += to.plane;
        });
      }
    }
  }
}

// lanes[c][i]: where lane i of a vector finds channel c of its own group, in lanes of kPair channels.
template <int64_t kWidth, int kPair = 1>
struct GroupLanes {
  alignas(64) int32_t lanes[kWidth * kWidth];
  explicit GroupLanes(int64_t group) {
    for (int64_t c = 0; c < group; ++c) {
      for (int64_t i = 0; i < kWidth; ++i)
        lanes[c * kWidth + i] = static_cast<int32_t>((i / group * group + c) / kPair);
    }
  }
};

// Panels of kWidth filters, of as many groups as that is: [tap row][tap column][pair of channels][lane][channel].
template <class D, class T>
inline void pack_grouped_panels(const ConvPackArgs& g, int64_t begin, int64_t end) {
  using C = typename D::C;
  constexpr int64_t kWidth = D::Ops::kWidth, kPair = D::kPair;
  const T* weight = static_cast<const T*>(g.weight);
  const int64_t filters = g.groups * g.outs, size = g.ins * kWidth;
  C* to = static_cast<C*>(g.panels) + begin * g.rows * g.cols * size;
  for (int64_t first = begin * kWidth; first < end * kWidth; first += kWidth) {
    const int64_t count = filters - first < kWidth ? filters - first : kWidth;
    int64_t at[kWidth];
    for (int64_t lane = 0; lane < count; ++lane) {
      at[lane] = (first + lane) / g.outs * g.group_stride + (first + lane) % g.outs * g.stride_out;
    }
    for (int t = 0; t < g.rows; ++t) {
      for (int u = 0; u < g.cols; ++u, to += size) {
        if (count < kWidth) set_zero(to, size);
        const T* tap = weight + g.row_index[t] * g.stride_row + g.col_index[u] * g.stride_col;
        for (int64_t c = 0; c < g.ins; ++c) {
          C* row = to + c / kPair * kPair * kWidth + c % kPair;
          for (int64_t lane = 0; lane < count; ++lane) put(row + lane * kPair, tap + at[lane] + c * g.stride_in, 1);
        }
      }
    }
  }
}

template <class D, class T>
inline void pack_grouped_weight(const ConvPackArgs& g, int64_t begin, int64_t end) {
  if constexpr (sizeof(T) == 2) {
    if (g.floats) return pack_grouped_panels<D, float>(g, begin, end);
  }
  pack_grouped_panels<D, T>(g, begin, end);
}
