// Convolution of groups of few channels: AVX-512 with the CPU's own bfloat16 dot product.
#include "conv/kernels.h"
#include "isa.h"

#if FR_X86
#define FR_AVX512_BF16 1
#include "simd/intrinsics.h"

namespace fused_resnet::cpu {
namespace {
#include "conv/grouped_body.h"
#include "simd/bf16_lanes.h"
}  // namespace

void conv_grouped_bf16_avx512_bf16(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  convolve_groups<Bf16Lanes, BFloat16, 14>(a, begin, end, scratch);
}
void conv_grouped_pack_bf16_avx512_bf16(const ConvPackArgs& a, int64_t begin, int64_t end) {
  pack_grouped_weight<Bf16Lanes, BFloat16>(a, begin, end);
}

}  // namespace fused_resnet::cpu
#endif  // FR_X86
