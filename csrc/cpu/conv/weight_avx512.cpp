// Weight gradient of a convolution: AVX-512 F, BW, DQ and VL.
#include "conv/weight_kernels.h"
#include "isa.h"

#if FR_X86
#include "simd/intrinsics.h"

namespace fused_resnet::cpu {
namespace {
#include "conv/weight_body.h"
#include "simd/vec_avx512.h"

using FloatDot = PlainDot<Avx512Float, kWeightF32Avx512.filters>;
}  // namespace

void conv_weight_gradient_f32_avx512(const WeightArgs& args, int64_t begin, int64_t end, void* scratch) {
  weight_gradient<FloatDot, float>(args, begin, end, scratch);
}
void conv_weight_gradient_bf16_avx512(const WeightArgs& args, int64_t begin, int64_t end, void* scratch) {
  weight_gradient<FloatDot, BFloat16>(args, begin, end, scratch);
}
void conv_weight_gradient_f16_avx512(const WeightArgs& args, int64_t begin, int64_t end, void* scratch) {
  weight_gradient<FloatDot, Float16>(args, begin, end, scratch);
}

}  // namespace fused_resnet::cpu
#endif  // FR_X86
