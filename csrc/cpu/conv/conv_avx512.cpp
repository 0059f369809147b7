// Convolution kernels: AVX-512 F, BW, DQ and VL.
#include "conv/kernels.h"
#include "isa.h"

#if FR_X86
#include "simd/intrinsics.h"

namespace fused_resnet::cpu {
namespace {
#include "conv/kernel_body.h"
#include "simd/vec_avx512.h"
using Single = RealDot<Avx512Float, kChain>;
using Widened = RealDot<Avx512Float>;
}  // namespace

void conv_f32_avx512(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  convolve<Single, float, 14>(a, begin, end, scratch);
}
void conv_pack_f32_avx512(const ConvPackArgs& a, int64_t begin, int64_t end) {
  pack_weight<Single, float>(a, begin, end);
}

void conv_bf16_avx512(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  convolve<Widened, BFloat16, 14>(a, begin, end, scratch);
}
void conv_pack_bf16_avx512(const ConvPackArgs& a, int64_t begin, int64_t end) {
  pack_weight<Widened, BFloat16>(a, begin, end);
}

void conv_f16_avx512(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  convolve<Widened, Float16, 14>(a, begin, end, scratch);
}
void conv_pack_f16_avx512(const ConvPackArgs& a, int64_t begin, int64_t end) {
  pack_weight<Widened, Float16>(a, begin, end);
}

}  // namespace fused_resnet::cpu
#endif  // FR_X86
