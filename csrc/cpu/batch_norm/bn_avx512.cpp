// Batch-norm kernels: AVX-512 F, BW, DQ and VL.
#include "isa.h"
#include "kernels.h"

#if FR_X86
#include "simd/intrinsics.h"

namespace fused_resnet::cpu {
namespace {
#include "batch_norm/kernel_body.h"
#include "simd/vec_avx512.h"
}  // namespace

void bn_stats_f32_avx512(const BnArgs& a, int64_t begin, int64_t end) { stats<Avx512Float, float>(a, begin, end); }
void bn_apply_f32_avx512(const BnArgs& a, int64_t begin, int64_t end) { apply<Avx512Float, float>(a, begin, end); }
void bn_backward_reduce_f32_avx512(const BnArgs& a, int64_t begin, int64_t end) {
  backward_reduce<Avx512Float, float>(a, begin, end);
}
void bn_backward_apply_f32_avx512(const BnArgs& a, int64_t begin, int64_t end) {
  backward_apply<Avx512Float, float>(a, begin, end);
}

void bn_stats_bf16_avx512(const BnArgs& a, int64_t begin, int64_t end) { stats<Avx512Float, BFloat16>(a, begin, end); }
void bn_apply_bf16_avx512(const BnArgs& a, int64_t begin, int64_t end) { apply<Avx512Float, BFloat16>(a, begin, end); }
void bn_backward_reduce_bf16_avx512(const BnArgs& a, int64_t begin, int64_t end) {
  backward_reduce<Avx512Float, BFloat16>(a, begin, end);
}
void bn_backward_apply_bf16_avx512(const BnArgs& a, int64_t begin, int64_t end) {
  backward_apply<Avx512Float, BFloat16>(a, begin, end);
}

void bn_stats_f16_avx512(const BnArgs& a, int64_t begin, int64_t end) { stats<Avx512Float, Float16>(a, begin, end); }
void bn_apply_f16_avx512(const BnArgs& a, int64_t begin, int64_t end) { apply<Avx512Float, Float16>(a, begin, end); }
void bn_backward_reduce_f16_avx512(const BnArgs& a, int64_t begin, int64_t end) {
  backward_reduce<Avx512Float, Float16>(a, begin, end);
}
void bn_backward_apply_f16_avx512(const BnArgs& a, int64_t begin, int64_t end) {
  backward_apply<Avx512Float, Float16>(a, begin, end);
}

}  // namespace fused_resnet::cpu
#endif  // FR_X86
