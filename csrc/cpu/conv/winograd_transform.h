// One-dimensional transforms of Winograd's F(4, 3) with the points 0, 1, -1, 1/2, -2 and infinity: docs/numerics.md.
// Included inside an unnamed namespace.
#pragma once

// B^T d: every entry is a small dyadic fraction.
template <class I>
FR_INLINE inline void transform_input(const typename I::V (&d)[6], typename I::V (&v)[6]) {
  const auto a = I::sub(d[3], d[1]), b = I::sub(d[4], d[2]);
  v[0] = I::fma(I::set1(1.5f), a, I::add(I::sub(d[0], d[2]), b));
  v[1] = I::fma(I::set1(2.5f), d[3], I::fma(I::set1(0.5f), d[2], I::sub(d[4], d[1])));
  v[2] = I::fma(I::set1(-2.5f), d[2], I::fma(I::set1(0.5f), d[3], I::add(d[4], d[1])));
  v[3] = I::fma(I::set1(2.0f), a, b);
  v[4] = I::fma(I::set1(-0.5f), a, b);
  v[5] = I::fma(I::set1(1.5f), b, I::sub(I::sub(d[5], d[3]), a));
}

// A^T m.
template <class I>
FR_INLINE inline void transform_output(const typename I::V (&m)[6], typename I::V (&y)[4]) {
  const auto s = I::add(m[1], m[2]), d = I::sub(m[1], m[2]);
  y[0] = I::add(I::add(m[0], s), I::add(m[3], m[4]));
  y[1] = I::fma(I::set1(0.5f), m[3], I::fma(I::set1(-2.0f), m[4], d));
  y[2] = I::fma(I::set1(0.25f), m[3], I::fma(I::set1(4.0f), m[4], s));
  y[3] = I::fma(I::set1(0.125f), m[3], I::fma(I::set1(-8.0f), m[4], I::add(d, m[5])));
}

// G g, in doubles: all fractions of the algorithm are here, and are rounded once. W is double or a vector of doubles.
template <class W>
FR_INLINE inline void transform_filter(const W& g0, const W& g1, const W& g2, W (&u)[6]) {
  const W s = (g0 + g2) * (1.0 / 3), t = g1 * (1.0 / 3);
  u[0] = g0;
  u[1] = s + t;
  u[2] = t - s;
  u[3] = g0 * (-16.0 / 15) + g1 * (-8.0 / 15) + g2 * (-4.0 / 15);
  u[4] = g0 * (1.0 / 15) + g1 * (-2.0 / 15) + g2 * (4.0 / 15);
  u[5] = g2;
}
