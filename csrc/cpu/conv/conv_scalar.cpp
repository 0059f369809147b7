// Convolution kernels: one lane at a time, for any CPU.
#include "conv/kernels.h"

namespace fused_resnet::cpu {
namespace {
#include "conv/kernel_body.h"
using Single = RealDot<ScalarOps<float>, kChain>;
using Widened = RealDot<ScalarOps<float>>;
using Double = RealDot<ScalarOps<double>>;
}  // namespace

void conv_f64_scalar(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  convolve<Double, double, 4>(a, begin, end, scratch);
}
void conv_pack_f64_scalar(const ConvPackArgs& a, int64_t begin, int64_t end) {
  pack_weight<Double, double>(a, begin, end);
}

void conv_f32_scalar(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  convolve<Single, float, 4>(a, begin, end, scratch);
}
void conv_pack_f32_scalar(const ConvPackArgs& a, int64_t begin, int64_t end) {
  pack_weight<Single, float>(a, begin, end);
}

void conv_bf16_scalar(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  convolve<Widened, BFloat16, 4>(a, begin, end, scratch);
}
void conv_pack_bf16_scalar(const ConvPackArgs& a, int64_t begin, int64_t end) {
  pack_weight<Widened, BFloat16>(a, begin, end);
}

void conv_f16_scalar(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  convolve<Widened, Float16, 4>(a, begin, end, scratch);
}
void conv_pack_f16_scalar(const ConvPackArgs& a, int64_t begin, int64_t end) {
  pack_weight<Widened, Float16>(a, begin, end);
}

}  // namespace fused_resnet::cpu
