// Convolution kernels: AVX2, FMA and F16C.
#include "conv/kernels.h"
#include "isa.h"

#if FR_X86
#include <immintrin.h>

namespace fused_resnet::cpu {
namespace {
#include "conv/kernel_body.h"
#include "simd/vec_avx2.h"
using Single = RealDot<Avx2Float, kChain>;
using Widened = RealDot<Avx2Float>;
using Double = RealDot<Avx2Double>;
}  // namespace

void conv_f64_avx2(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  convolve<Double, double, 6>(a, begin, end, scratch);
}
void conv_pack_f64_avx2(const ConvPackArgs& a, int64_t begin, int64_t end) {
  pack_weight<Double, double>(a, begin, end);
}

void conv_f32_avx2(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  convolve<Single, float, 6>(a, begin, end, scratch);
}
void conv_pack_f32_avx2(const ConvPackArgs& a, int64_t begin, int64_t end) {
  pack_weight<Single, float>(a, begin, end);
}

void conv_bf16_avx2(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  convolve<Widened, BFloat16, 6>(a, begin, end, scratch);
}
void conv_pack_bf16_avx2(const ConvPackArgs& a, int64_t begin, int64_t end) {
  pack_weight<Widened, BFloat16>(a, begin, end);
}

void conv_f16_avx2(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  convolve<Widened, Float16, 6>(a, begin, end, scratch);
}
void conv_pack_f16_avx2(const ConvPackArgs& a, int64_t begin, int64_t end) {
  pack_weight<Widened, Float16>(a, begin, end);
}

}  // namespace fused_resnet::cpu
#endif  // FR_X86
