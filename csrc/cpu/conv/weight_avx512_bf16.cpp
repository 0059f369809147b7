// Weight gradient of a convolution: AVX-512 with the CPU's own bfloat16 products, two pixels a step.
#include "conv/weight_kernels.h"
#include "isa.h"

#if FR_X86
#define FR_AVX512_BF16 1
#include "simd/intrinsics.h"

namespace fused_resnet::cpu {
namespace {
#include "conv/weight_body.h"
#include "simd/pixel_pairs.h"

using PairDot = PixelPairs<kWeightBf16Avx512Bf16.filters>;
}  // namespace

void conv_weight_gradient_bf16_avx512_bf16(const WeightArgs& args, int64_t begin, int64_t end, void* scratch) {
  weight_gradient<PairDot, BFloat16>(args, begin, end, scratch);
}

}  // namespace fused_resnet::cpu
#endif  // FR_X86
