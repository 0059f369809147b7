// Weight gradient of a convolution: AVX2, FMA and F16C.
#include "conv/weight_kernels.h"
#include "isa.h"

#if FR_X86
#include <immintrin.h>

namespace fused_resnet::cpu {
namespace {
#include "conv/weight_body.h"
#include "simd/vec_avx2.h"

using FloatDot = PlainDot<Avx2Float, kWeightF32Avx2.filters>;
using DoubleDot = PlainDot<Avx2Double, kWeightF64Avx2.filters>;
}  // namespace

void conv_weight_gradient_f64_avx2(const WeightArgs& args, int64_t begin, int64_t end, void* scratch) {
  weight_gradient<DoubleDot, double>(args, begin, end, scratch);
}
void conv_weight_gradient_f32_avx2(const WeightArgs& args, int64_t begin, int64_t end, void* scratch) {
  weight_gradient<FloatDot, float>(args, begin, end, scratch);
}
void conv_weight_gradient_bf16_avx2(const WeightArgs& args, int64_t begin, int64_t end, void* scratch) {
  weight_gradient<FloatDot, BFloat16>(args, begin, end, scratch);
}
void conv_weight_gradient_f16_avx2(const WeightArgs& args, int64_t begin, int64_t end, void* scratch) {
  weight_gradient<FloatDot, Float16>(args, begin, end, scratch);
}

}  // namespace fused_resnet::cpu
#endif  // FR_X86
