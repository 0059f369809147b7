// Stem kernels: AVX2, FMA and F16C.
#include "isa.h"
#include "kernels.h"

#if FR_X86
#include <immintrin.h>

namespace fused_resnet::cpu {
namespace {
#include "pool/kernel_body.h"
#include "simd/vec_avx2.h"
}  // namespace

void pool_forward_f64_avx2(const PoolArgs& a, int64_t begin, int64_t end) {
  forward<Avx2Double, double>(a, begin, end);
}
void pool_backward_reduce_f64_avx2(const PoolArgs& a, int64_t begin, int64_t end) {
  backward_reduce<Avx2Double, double>(a, begin, end);
}
void pool_backward_apply_f64_avx2(const PoolArgs& a, int64_t begin, int64_t end) {
  backward_apply<Avx2Double, double>(a, begin, end);
}

void pool_forward_f32_avx2(const PoolArgs& a, int64_t begin, int64_t end) { forward<Avx2Float, float>(a, begin, end); }
void pool_backward_reduce_f32_avx2(const PoolArgs& a, int64_t begin, int64_t end) {
  backward_reduce<Avx2Float, float>(a, begin, end);
}
void pool_backward_apply_f32_avx2(const PoolArgs& a, int64_t begin, int64_t end) {
  backward_apply<Avx2Float, float>(a, begin, end);
}

void pool_forward_bf16_avx2(const PoolArgs& a, int64_t begin, int64_t end) {
  forward<Avx2Float, BFloat16>(a, begin, end);
}
void pool_backward_reduce_bf16_avx2(const PoolArgs& a, int64_t begin, int64_t end) {
  backward_reduce<Avx2Float, BFloat16>(a, begin, end);
}
void pool_backward_apply_bf16_avx2(const PoolArgs& a, int64_t begin, int64_t end) {
  backward_apply<Avx2Float, BFloat16>(a, begin, end);
}

void pool_forward_f16_avx2(const PoolArgs& a, int64_t begin, int64_t end) {
  forward<Avx2Float, Float16>(a, begin, end);
}
void pool_backward_reduce_f16_avx2(const PoolArgs& a, int64_t begin, int64_t end) {
  backward_reduce<Avx2Float, Float16>(a, begin, end);
}
void pool_backward_apply_f16_avx2(const PoolArgs& a, int64_t begin, int64_t end) {
  backward_apply<Avx2Float, Float16>(a, begin, end);
}

}  // namespace fused_resnet::cpu
#endif  // FR_X86
