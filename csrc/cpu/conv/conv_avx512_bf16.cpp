// Convolution kernels: AVX-512 with the CPU's own bfloat16 dot product.
#include "conv/kernels.h"
#include "isa.h"

#if FR_X86
#define FR_AVX512_BF16 1
#include "simd/intrinsics.h"

namespace fused_resnet::cpu {
namespace {
#include "conv/kernel_body.h"
#include "simd/bf16_dot.h"
#include "simd/vec_avx512.h"
}  // namespace

void conv_bf16_avx512_bf16(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  convolve<Bf16Dot, BFloat16, 14>(a, begin, end, scratch);
}
void conv_pack_bf16_avx512_bf16(const ConvPackArgs& a, int64_t begin, int64_t end) {
  pack_weight<Bf16Dot, BFloat16>(a, begin, end);
}

}  // namespace fused_resnet::cpu
#endif  // FR_X86
