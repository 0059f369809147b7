// exp and tanh in single precision, written once over any vector type. Included
// inside an unnamed namespace, before the vector headers. Errors measured over
// every float: docs/numerics.md. Source: Cephes (Moshier), expf.c and tanhf.c.
#pragma once

template <class I>
inline typename I::V polynomial_exp(typename I::V x) {
  // Above 2^127.5 infinity, so that sigmoid reaches 0; below, the smallest normal
  // float. max and min keep a NaN in x.
  constexpr float kLargest = 88.37626f;
  const auto overflow = I::gt(x, I::set1(kLargest));
  x = I::max(I::set1(-87.33654f), I::min(I::set1(kLargest), x));
  const auto n = I::round(I::mul(x, I::set1(1.44269504088896341f)));
  auto r = I::fma(n, I::set1(-0.693359375f), x);
  r = I::fma(n, I::set1(2.12194440e-4f), r);
  auto p = I::set1(1.9875691500e-4f);
  p = I::fma(p, r, I::set1(1.3981999507e-3f));
  p = I::fma(p, r, I::set1(8.3334519073e-3f));
  p = I::fma(p, r, I::set1(4.1665795894e-2f));
  p = I::fma(p, r, I::set1(1.6666665459e-1f));
  p = I::fma(p, r, I::set1(5.0000001201e-1f));
  p = I::add(I::fma(p, I::mul(r, r), r), I::set1(1.0f));
  return I::select(overflow, I::set1(__builtin_inff()), I::scale2(p, n));
}

template <class I>
inline typename I::V polynomial_tanh(typename I::V x) {
  const auto a = I::abs(x);
  const auto z = I::mul(x, x);
  auto p = I::set1(-5.70498872745e-3f);
  p = I::fma(p, z, I::set1(2.06390887954e-2f));
  p = I::fma(p, z, I::set1(-5.37397155531e-2f));
  p = I::fma(p, z, I::set1(1.33314422036e-1f));
  p = I::fma(p, z, I::set1(-3.33332819422e-1f));
  const auto near = I::copy_sign(I::fma(I::mul(p, z), x, x), x);  // the sign of a zero, too
  const auto e = polynomial_exp<I>(I::add(a, a));
  const auto far = I::sub(I::set1(1.0f), I::div(I::set1(2.0f), I::add(e, I::set1(1.0f))));
  return I::select(I::gt(a, I::set1(0.625f)), I::copy_sign(far, x), near);
}
