// Winograd convolution: any CPU, one lane at a time.
#include "conv/weight_kernels.h"

namespace fused_resnet::cpu {
namespace {
#include "conv/winograd_body.h"
#include "conv/winograd_weight.h"
#include "simd/vec_scalar.h"
using Single = RealDot<ScalarOps<float>, kWinogradChain>;
using Widened = RealDot<ScalarOps<float>>;
}  // namespace

void conv_winograd_f32_scalar(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  winograd<Single, float, 4>(a, begin, end, scratch);
}
void conv_winograd_pack_f32_scalar(const ConvPackArgs& a, int64_t begin, int64_t end) {
  winograd_pack<Single, float>(a, begin, end);
}
void conv_winograd_bf16_scalar(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  winograd<Widened, BFloat16, 4>(a, begin, end, scratch);
}
void conv_winograd_pack_bf16_scalar(const ConvPackArgs& a, int64_t begin, int64_t end) {
  winograd_pack<Widened, BFloat16>(a, begin, end);
}
void conv_winograd_f16_scalar(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  winograd<Widened, Float16, 4>(a, begin, end, scratch);
}
void conv_winograd_pack_f16_scalar(const ConvPackArgs& a, int64_t begin, int64_t end) {
  winograd_pack<Widened, Float16>(a, begin, end);
}
void conv_winograd_weight_f32_scalar(const WeightArgs& a, int64_t begin, int64_t end, void* scratch) {
  winograd_weight<ScalarOps<float>, float, 4>(a, begin, end, scratch);
}
void conv_winograd_weight_bf16_scalar(const WeightArgs& a, int64_t begin, int64_t end, void* scratch) {
  winograd_weight<ScalarOps<float>, BFloat16, 4>(a, begin, end, scratch);
}
void conv_winograd_weight_f16_scalar(const WeightArgs& a, int64_t begin, int64_t end, void* scratch) {
  winograd_weight<ScalarOps<float>, Float16, 4>(a, begin, end, scratch);
}

}  // namespace fused_resnet::cpu
