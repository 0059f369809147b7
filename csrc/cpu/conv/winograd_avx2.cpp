// Winograd convolution: AVX2, FMA and F16C.
#include "conv/weight_kernels.h"
#include "isa.h"

#if FR_X86
#include <immintrin.h>

namespace fused_resnet::cpu {
namespace {
#include "conv/winograd_body.h"
#include "conv/winograd_weight.h"
#include "simd/vec_avx2.h"
using Single = RealDot<Avx2Float, kWinogradChain>;
using Widened = RealDot<Avx2Float>;
}  // namespace

void conv_winograd_f32_avx2(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  winograd<Single, float, 6>(a, begin, end, scratch);
}
void conv_winograd_pack_f32_avx2(const ConvPackArgs& a, int64_t begin, int64_t end) {
  winograd_pack<Single, float>(a, begin, end);
}
void conv_winograd_bf16_avx2(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  winograd<Widened, BFloat16, 6>(a, begin, end, scratch);
}
void conv_winograd_pack_bf16_avx2(const ConvPackArgs& a, int64_t begin, int64_t end) {
  winograd_pack<Widened, BFloat16>(a, begin, end);
}
void conv_winograd_f16_avx2(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  winograd<Widened, Float16, 6>(a, begin, end, scratch);
}
void conv_winograd_pack_f16_avx2(const ConvPackArgs& a, int64_t begin, int64_t end) {
  winograd_pack<Widened, Float16>(a, begin, end);
}
void conv_winograd_weight_f32_avx2(const WeightArgs& a, int64_t begin, int64_t end, void* scratch) {
  winograd_weight<Avx2Float, float, 6>(a, begin, end, scratch);
}
void conv_winograd_weight_bf16_avx2(const WeightArgs& a, int64_t begin, int64_t end, void* scratch) {
  winograd_weight<Avx2Float, BFloat16, 6>(a, begin, end, scratch);
}
void conv_winograd_weight_f16_avx2(const WeightArgs& a, int64_t begin, int64_t end, void* scratch) {
  winograd_weight<Avx2Float, Float16, 6>(a, begin, end, scratch);
}

}  // namespace fused_resnet::cpu
#endif  // FR_X86
