// Stem kernels: AVX-512 with the CPU's own float to bfloat16 conversion.
#include "isa.h"
#include "kernels.h"

#if FR_X86
#define FR_AVX512_BF16 1
#include "simd/intrinsics.h"

namespace fused_resnet::cpu {
namespace {
#include "pool/kernel_body.h"
#include "simd/vec_avx512.h"
}  // namespace

void pool_forward_bf16_avx512_bf16(const PoolArgs& a, int64_t begin, int64_t end) {
  forward<Avx512Float, BFloat16>(a, begin, end);
}
void pool_backward_reduce_bf16_avx512_bf16(const PoolArgs& a, int64_t begin, int64_t end) {
  backward_reduce<Avx512Float, BFloat16>(a, begin, end);
}
void pool_backward_apply_bf16_avx512_bf16(const PoolArgs& a, int64_t begin, int64_t end) {
  backward_apply<Avx512Float, BFloat16>(a, begin, end);
}

}  // namespace fused_resnet::cpu
#endif  // FR_X86
