// Batch-norm kernels: AVX-512 F, BW, DQ and VL.
#include "kernels.h"

#include "isa.h"

#if FR_X86
#include "simd/intrinsics.h"

namespace fused_resnet::cpu {
namespace {
#include "simd/storage.h"
#include "simd/vec_math.h"
#include "simd/vec_scalar.h"
#include "simd/vec_avx512.h"
#include "simd/activation.h"
#include "simd/rows.h"
#include "batch_norm/kernel_body.h"
}  // namespace

void bn_stats_f64_avx512(const BnArgs& a, int64_t begin, int64_t end) { stats<Avx512Double, double>(a, begin, end); }
void bn_apply_f64_avx512(const BnArgs& a, int64_t begin, int64_t end) { apply<Avx512Double, double>(a, begin, end); }
void bn_backward_reduce_f64_avx512(const BnArgs& a, int64_t begin, int64_t end) { backward_reduce<Avx512Double, double>(a, begin, end); }
void bn_backward_apply_f64_avx512(const BnArgs& a, int64_t begin, int64_t end) { backward_apply<Avx512Double, double>(a, begin, end); }

void bn_stats_f32_avx512(const BnArgs& a, int64_t begin, int64_t end) { stats<Avx512Float, float>(a, begin, end); }
void bn_apply_f32_avx512(const BnArgs& a, int64_t begin, int64_t end) { apply<Avx512Float, float>(a, begin, end); }
void bn_backward_reduce_f32_avx512(const BnArgs& a, int64_t begin, int64_t end) { backward_reduce<Avx512Float, float>(a, begin, end); }
void bn_backward_apply_f32_avx512(const BnArgs& a, int64_t begin, int64_t end) { backward_apply<Avx512Float, float>(a, begin, end); }

void bn_stats_bf16_avx512(const BnArgs& a, int64_t begin, int64_t end) { stats<Avx512Float, BFloat16>(a, begin, end); }
void bn_apply_bf16_avx512(const BnArgs& a, int64_t begin, int64_t end) { apply<Avx512Float, BFloat16>(a, begin, end); }
void bn_backward_reduce_bf16_avx512(const BnArgs& a, int64_t begin, int64_t end) { backward_reduce<Avx512Float, BFloat16>(a, begin, end); }
void bn_backward_apply_bf16_avx512(const BnArgs& a, int64_t begin, int64_t end) { backward_apply<Avx512Float, BFloat16>(a, begin, end); }

void bn_stats_f16_avx512(const BnArgs& a, int64_t begin, int64_t end) { stats<Avx512Float, Float16>(a, begin, end); }
void bn_apply_f16_avx512(const BnArgs& a, int64_t begin, int64_t end) { apply<Avx512Float, Float16>(a, begin, end); }
void bn_backward_reduce_f16_avx512(const BnArgs& a, int64_t begin, int64_t end) { backward_reduce<Avx512Float, Float16>(a, begin, end); }
void bn_backward_apply_f16_avx512(const BnArgs& a, int64_t begin, int64_t end) { backward_apply<Avx512Float, Float16>(a, begin, end); }

}  // namespace fused_resnet::cpu
#endif  // FR_X86
