// Convolution of groups of few channels: AVX2, FMA and F16C.
#include "conv/weight_kernels.h"
#include "isa.h"

#if FR_X86
#include <immintrin.h>

namespace fused_resnet::cpu {
namespace {
#include "conv/grouped_body.h"
#include "conv/grouped_weight.h"
#include "simd/vec_avx2.h"
using Single = RealLanes<Avx2Float>;
}  // namespace

void conv_grouped_f32_avx2(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  convolve_groups<Single, float, 10>(a, begin, end, scratch);
}
void conv_grouped_pack_f32_avx2(const ConvPackArgs& a, int64_t begin, int64_t end) {
  pack_grouped_weight<Single, float>(a, begin, end);
}
void conv_grouped_weight_f32_avx2(const WeightArgs& a, int64_t begin, int64_t end, void* scratch) {
  grouped_weight_gradient<Avx2Float, float>(a, begin, end, scratch);
}

void conv_grouped_bf16_avx2(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  convolve_groups<Single, BFloat16, 10>(a, begin, end, scratch);
}
void conv_grouped_pack_bf16_avx2(const ConvPackArgs& a, int64_t begin, int64_t end) {
  pack_grouped_weight<Single, BFloat16>(a, begin, end);
}
void conv_grouped_weight_bf16_avx2(const WeightArgs& a, int64_t begin, int64_t end, void* scratch) {
  grouped_weight_gradient<Avx2Float, BFloat16>(a, begin, end, scratch);
}

void conv_grouped_f16_avx2(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  convolve_groups<Single, Float16, 10>(a, begin, end, scratch);
}
void conv_grouped_pack_f16_avx2(const ConvPackArgs& a, int64_t begin, int64_t end) {
  pack_grouped_weight<Single, Float16>(a, begin, end);
}
void conv_grouped_weight_f16_avx2(const WeightArgs& a, int64_t begin, int64_t end, void* scratch) {
  grouped_weight_gradient<Avx2Float, Float16>(a, begin, end, scratch);
}

}  // namespace fused_resnet::cpu
#endif  // FR_X86
