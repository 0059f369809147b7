// Batch-norm kernels: AVX-512 with the CPU's own float to bfloat16 conversion.
#include "isa.h"
#include "kernels.h"

#if FR_X86
#define FR_AVX512_BF16 1
#include "simd/intrinsics.h"

namespace fused_resnet::cpu {
namespace {
#include "batch_norm/kernel_body.h"
#include "simd/vec_avx512.h"
}  // namespace

void bn_stats_bf16_avx512_bf16(const BnArgs& a, int64_t begin, int64_t end) {
  stats<Avx512Float, BFloat16>(a, begin, end);
}
void bn_apply_bf16_avx512_bf16(const BnArgs& a, int64_t begin, int64_t end) {
  apply<Avx512Float, BFloat16>(a, begin, end);
}
void bn_backward_reduce_bf16_avx512_bf16(const BnArgs& a, int64_t begin, int64_t end) {
  backward_reduce<Avx512Float, BFloat16>(a, begin, end);
}
void bn_backward_apply_bf16_avx512_bf16(const BnArgs& a, int64_t begin, int64_t end) {
  backward_apply<Avx512Float, BFloat16>(a, begin, end);
}

}  // namespace fused_resnet::cpu
#endif  // FR_X86
