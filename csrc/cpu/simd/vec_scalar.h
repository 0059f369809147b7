// One lane, any CPU: the reference level of the kernels and the oracle of the
// vector levels. Included inside an unnamed namespace, after storage.h.
#pragma once

#include "simd/storage.h"

template <class Real>
struct ScalarOps {
  using S = Real;
  using V = Real;
  using M = bool;
  static constexpr int kWidth = 1;

  static V zero() { return 0; }
  static V set1(S x) { return x; }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V div(V a, V b) { return a / b; }
  static V fma(V a, V b, V c) { return a * b + c; }
  // As x86: the second operand when either is NaN or both are zero.
  static V max(V a, V b) { return a > b ? a : b; }
  static V min(V a, V b) { return a < b ? a : b; }
  static V abs(V a) { return a < 0 ? -a : a; }
  static V copy_sign(V magnitude, V sign) { return __builtin_copysign(magnitude, sign); }

  static M gt(V a, V b) { return a > b; }
  static M not_le(V a, V b) { return !(a <= b); }
  static M eq(V a, V b) { return a == b; }
  static M is_nan(V a) { return a != a; }
  static M or_(M a, M b) { return a || b; }
  static V select(M m, V a, V b) { return m ? a : b; }
  static unsigned bits(M m) { return m ? 1u : 0u; }
  static M from_bits(unsigned b) { return (b & 1u) != 0; }

  static V exp(V x) { return __builtin_exp(x); }
  static V tanh(V x) { return __builtin_tanh(x); }
  static double sum(V x) { return x; }

  static V load(const Real* p) { return *p; }
  static V load(const BFloat16* p) { return to_float(*p); }
  static V load(const Float16* p) { return to_float(*p); }
  static void store(Real* p, V v) { *p = v; }
  static void store(BFloat16* p, V v) { *p = to_bfloat16(v); }
  static void store(Float16* p, V v) { *p = to_float16(v); }
  template <class T>
  static void stream(T* p, V v) {
    store(p, v);
  }
  static V load_u8(const uint8_t* p) { return static_cast<Real>(*p); }
  static void store_u8(uint8_t* p, V v) { *p = static_cast<uint8_t>(v); }
  static void fence() {}
};
