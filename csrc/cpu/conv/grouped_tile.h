// The register tile of groups that share a vector: every lane is a filter and wants the channels of its own group, so
// a vector of channels is multiplied once for each channel of a group, with its lanes permuted. Included inside an
// unnamed namespace after the vector headers.
#pragma once

// Floats or doubles: one channel a step.
template <class I>
struct RealLanes {
  using Ops = I;
  using C = typename I::S;         // the compute type
  static constexpr int kPair = 1;  // channels of a lane, in a permuted vector and in a weight
  static auto lanes(const int32_t* p) { return I::load_lanes(p); }
  static auto vector(const C* p) { return I::load(p); }
  static auto weights(const C* p) { return I::load(p); }
  template <class Lanes>
  static auto permute(typename I::V v, Lanes lanes) {
    return I::permute(v, lanes);
  }
  static auto fma(typename I::V a, typename I::V b, typename I::V sum) { return I::fma(a, b, sum); }
};

// A vector of a packed plane is a pixel's channels of as many groups as fill it.
struct GroupedTile {
  int rows = 0, runs = 0;                          // of taps: rows, and runs of neighbouring columns
  int64_t row[kMaxTaps] = {}, run[kMaxTaps] = {};  // where they start, in elements
  int64_t step = 0;                                // from one position to the next, in elements
  int64_t group = 1;                               // channels
  const int32_t* lanes = nullptr;                  // GroupLanes
};

// kRows positions, kStep vectors apart, times one vector of filters, with runs of kCols taps, kApart vectors apart.
// What is permuted serves every tap of a run. kCols = 1: the step is the tile's.
template <class D, int kRows, int kStep, int kApart, int kCols>
inline void multiply_groups(const GroupedTile& t, const typename D::C* a, const typename D::C* b,
                            typename D::Ops::S* out) {
  using I = typename D::Ops;
  using C = typename D::C;
  constexpr int kWidth = I::kWidth, kVectors = (kRows - 1) * kStep + (kCols - 1) * kApart + 1;
  typename I::V sum[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) sum[i] = I::zero();
  for (int row = 0; row < t.rows; ++row) {
    for (int run = 0; run < t.runs; ++run, b += kCols * t.group * kWidth) {
      const C* first = a + t.row[row] + t.run[run];
      for (int64_t c = 0; c < t.group; c += D::kPair) {
        const auto lanes = D::lanes(t.lanes + c * kWidth);
        decltype(D::weights(b)) w[kCols];
#pragma GCC unroll 4
        for (int u = 0; u < kCols; ++u) w[u] = D::weights(b + (u * t.group + c) * kWidth);
        if constexpr (kCols == 1) {
          const C* p = first;
#pragma GCC unroll 16
          for (int i = 0; i < kRows; ++i, p += t.step) sum[i] = D::fma(D::permute(D::vector(p), lanes), w[0], sum[i]);
        } else {
#pragma GCC unroll 40
          for (int x = 0; x < kVectors; ++x) {
            const auto v = D::permute(D::vector(first + x * kWidth), lanes);
#pragma GCC unroll 4
            for (int u = 0; u < kCols; ++u) {
              const int from = x - u * kApart;
              if (from >= 0 && from % kStep == 0 && from / kStep < kRows)
                sum[from / kStep] = D::fma(v, w[u], sum[from / kStep]);
            }
          }
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) I::store(out + i * kWidth, sum[i]);
}

template <class D>
using MultiplyGroups = void (*)(const GroupedTile&, const typename D::C*, const typename D::C*, typename D::Ops::S*);

template <class D, int kTile, int kStep, int kApart, int kCols>
inline MultiplyGroups<D> multiply_groups_rows(int64_t rows) {
  if constexpr (kTile > 1) {
    if (rows < kTile) return multiply_groups_rows<D, kTile - 1, kStep, kApart, kCols>(rows);
  }
  return &multiply_groups<D, kTile, kStep, kApart, kCols>;
}

// How the columns of taps of one problem are taken together.
struct TapRuns {
  int cols = 1;                 // neighbouring columns of a run
  int64_t step = 1, apart = 1;  // from one position, and one of these columns, to the next, in vectors
};

// The kernels there are: those of a ResNeXt's 3x3 with strides 1 and 2, and of its data gradients, at one or two images
// side by side. Everything else goes tap by tap.
inline bool have_runs(const TapRuns& r) {
  if (r.cols == 3) return (r.step == 1 && (r.apart == 1 || r.apart == 2)) || (r.step == 2 && r.apart == 1);
  return r.cols == 2 && r.step == 1 && (r.apart == 1 || r.apart == 2);
}

template <class D, int kTile>
inline MultiplyGroups<D> multiply_groups_for(const TapRuns& r, int64_t rows) {
  if (r.cols == 3 && r.step == 2) return multiply_groups_rows<D, kTile, 2, 1, 3>(rows);
  if (r.cols == 3 && r.apart == 2) return multiply_groups_rows<D, kTile, 1, 2, 3>(rows);
  if (r.cols == 3) return multiply_groups_rows<D, kTile, 1, 1, 3>(rows);
  if (r.cols == 2 && r.apart == 2) return multiply_groups_rows<D, kTile, 1, 2, 2>(rows);
  if (r.cols == 2) return multiply_groups_rows<D, kTile, 1, 1, 2>(rows);
  return multiply_groups_rows<D, kTile, 1, 1, 1>(rows);
}
