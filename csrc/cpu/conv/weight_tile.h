// The register tile of the weight gradient: filters x channels, summed over the steps of a block. Included inside an
// unnamed namespace by weight_body.h.
#pragma once

// What a thread sets up for some kernels and others.
struct NoTiles {};
// What a kernel that may meet any value knows of those that it packed.
struct NothingSeen {
  template <class V>
  FR_INLINE void add(V) {}
};

// One pixel a step, in the arithmetic of the vector type.
template <class Ops, int kFilters>
struct PlainDot {
  using I = Ops;
  using Unit = typename Ops::S;
  using V = typename Ops::V;
  using State = NoTiles;
  using Seen = NothingSeen;
  static constexpr int kGroup = 1;  // steps that are taken at once
  static constexpr int kParts = 1;  // units of a step and channel, one behind the other in memory
  static constexpr int kPair = 1, kWidth = Ops::kWidth, kMr = kFilters, kNr = 2;
  static V load(const Unit* p) { return Ops::load(p); }
  static V broadcast(const Unit* p) { return Ops::set1(*p); }
  static V multiply_add(V x, V y, V sum) { return Ops::fma(x, y, sum); }
  static void store(Unit* p, V v) { Ops::store(p, v); }
  static void pack(Unit* p, V v, V, int64_t) { Ops::store(p, v); }
};

template <class D>
struct Tile {
  using Unit = typename D::Unit;
  static constexpr int kParts = D::kParts;
  const Unit *a, *dz;
  int64_t a_step, a_run;  // units from step to step and from run to run
  int64_t runs, steps;    // of a run
  typename D::I::S* sums;
  const char* next_sums;  // of the tile after this one
  bool first;             // nothing stands in `sums` yet
  const char* ahead;      // a cache line a step, for what is packed next
  int64_t ahead_step;
};

template <class D, int kMr, int kNr>
void multiply_tile(const Tile<D>& t) {
  using I = typename D::I;
  constexpr int64_t lanes = D::kNr * D::kWidth;
  typename I::V sum[kMr][kNr];
#pragma GCC unroll 16
  for (int i = 0; i < kMr; ++i) {
    __builtin_prefetch(t.sums + i * lanes, 1);
    __builtin_prefetch(t.sums + i * lanes + lanes / 2, 1);
#pragma GCC unroll 2
    for (int j = 0; j < kNr; ++j) sum[i][j] = I::zero();
  }
  const typename D::Unit* dz = t.dz;
  const char* ahead = t.ahead;
  const int64_t a_step = t.a_step, ahead_step = t.ahead_step;
  for (int64_t run = 0; run < t.runs; ++run) {
    const typename D::Unit* a = t.a + run * t.a_run;
    for (int64_t left = t.steps; left > 0; --left) {
      typename D::V x[kNr];
#pragma GCC unroll 2
      for (int j = 0; j < kNr; ++j) x[j] = D::load(a + j * D::kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < kMr; ++i) {
        const auto y = D::broadcast(dz + i);
#pragma GCC unroll 2
        for (int j = 0; j < kNr; ++j) sum[i][j] = D::multiply_add(y, x[j], sum[i][j]);
      }
      __builtin_prefetch(ahead, 0, 2);
      a += a_step;
      dz += kMr;
      ahead += ahead_step;
    }
  }
  typename I::S* sums = t.sums;
  if (t.first) {
#pragma GCC unroll 16
    for (int i = 0; i < kMr; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kNr; ++j) I::store(sums + i * lanes + j * D::kWidth, sum[i][j]);
    }
    return;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kMr; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kNr; ++j) {
      typename I::S* to = sums + i * lanes + j * D::kWidth;
      I::store(to, I::add(I::load(to), sum[i][j]));
    }
  }
}

template <class D>
using TileKernel = void (*)(const Tile<D>&);

template <class D, int kNr, int kMr = D::kMr>
inline TileKernel<D> pick_filters(int filters) {
  if constexpr (kMr > 1) {
    if (filters < kMr) return pick_filters<D, kNr, kMr - 1>(filters);
  }
  return multiply_tile<D, kMr, kNr>;
}

template <class D>
inline TileKernel<D> tile_kernel(int filters, int vectors) {
  return vectors == 1 ? pick_filters<D, 1>(filters) : pick_filters<D, D::kNr>(filters);
}
