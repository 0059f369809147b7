// Winograd convolution: AVX-512 F, BW, DQ and VL.
#include "conv/weight_kernels.h"
#include "isa.h"

#if FR_X86
#include "simd/intrinsics.h"

namespace fused_resnet::cpu {
namespace {
#include "conv/winograd_body.h"
#include "conv/winograd_weight.h"
#include "simd/vec_avx512.h"
using Single = RealDot<Avx512Float, kWinogradChain>;
using Widened = RealDot<Avx512Float>;
}  // namespace

void conv_winograd_f32_avx512(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  winograd<Single, float, 14>(a, begin, end, scratch);
}
void conv_winograd_pack_f32_avx512(const ConvPackArgs& a, int64_t begin, int64_t end) {
  winograd_pack<Single, float>(a, begin, end);
}
void conv_winograd_bf16_avx512(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  winograd<Widened, BFloat16, 14>(a, begin, end, scratch);
}
void conv_winograd_pack_bf16_avx512(const ConvPackArgs& a, int64_t begin, int64_t end) {
  winograd_pack<Widened, BFloat16>(a, begin, end);
}
void conv_winograd_f16_avx512(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  winograd<Widened, Float16, 14>(a, begin, end, scratch);
}
void conv_winograd_pack_f16_avx512(const ConvPackArgs& a, int64_t begin, int64_t end) {
  winograd_pack<Widened, Float16>(a, begin, end);
}
void conv_winograd_weight_f32_avx512(const WeightArgs& a, int64_t begin, int64_t end, void* scratch) {
  winograd_weight<Avx512Float, float, 14>(a, begin, end, scratch);
}
void conv_winograd_weight_bf16_avx512(const WeightArgs& a, int64_t begin, int64_t end, void* scratch) {
  winograd_weight<Avx512Float, BFloat16, 14>(a, begin, end, scratch);
}
void conv_winograd_weight_f16_avx512(const WeightArgs& a, int64_t begin, int64_t end, void* scratch) {
  winograd_weight<Avx512Float, Float16, 14>(a, begin, end, scratch);
}

}  // namespace fused_resnet::cpu
#endif  // FR_X86
