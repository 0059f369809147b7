// Weight gradient of a convolution: one lane at a time, for any CPU.
#include "conv/weight_kernels.h"

namespace fused_resnet::cpu {
namespace {
#include "conv/weight_body.h"
#include "simd/vec_scalar.h"

using FloatDot = PlainDot<ScalarOps<float>, kWeightF32Scalar.filters>;
using DoubleDot = PlainDot<ScalarOps<double>, kWeightF64Scalar.filters>;
}  // namespace

void conv_weight_gradient_f64_scalar(const WeightArgs& args, int64_t begin, int64_t end, void* scratch) {
  weight_gradient<DoubleDot, double>(args, begin, end, scratch);
}
void conv_weight_gradient_f32_scalar(const WeightArgs& args, int64_t begin, int64_t end, void* scratch) {
  weight_gradient<FloatDot, float>(args, begin, end, scratch);
}
void conv_weight_gradient_bf16_scalar(const WeightArgs& args, int64_t begin, int64_t end, void* scratch) {
  weight_gradient<FloatDot, BFloat16>(args, begin, end, scratch);
}
void conv_weight_gradient_f16_scalar(const WeightArgs& args, int64_t begin, int64_t end, void* scratch) {
  weight_gradient<FloatDot, Float16>(args, begin, end, scratch);
}

}  // namespace fused_resnet::cpu
