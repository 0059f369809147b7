// The sums of several slices, added. Included inside an unnamed namespace after the vector headers.
#pragma once

// The slices' sums of one vector, added pairwise.
template <class I>
inline typename I::V sum_slices(const typename I::S* sums, int64_t slices, int64_t stride) {
  typename I::V v[kMaxSlices];
  for (int64_t i = 0; i < slices; ++i) v[i] = I::load(sums + i * stride);
  for (int64_t n = slices; n > 1; n = (n + 1) / 2) {
    for (int64_t i = 0; i < n / 2; ++i) v[i] = I::add(v[2 * i], v[2 * i + 1]);
    if (n % 2 != 0) v[n / 2] = v[n - 1];
  }
  return v[0];
}
