// Weight gradient of a convolution: AMX tiles of bfloat16, or of floats in parts, sixteen pairs of pixels a step.
#include "conv/weight_kernels.h"
#include "isa.h"

#if FR_X86
#define FR_AVX512_BF16 1
#include "simd/intrinsics.h"

namespace fused_resnet::cpu {
namespace {
#include "conv/weight_body.h"
#include "simd/amx_pixel_parts.h"
#include "simd/amx_pixels.h"
}  // namespace

void conv_weight_gradient_bf16_amx(const WeightArgs& args, int64_t begin, int64_t end, void* scratch) {
  weight_gradient<TilePairs, BFloat16>(args, begin, end, scratch);
}
void conv_weight_gradient_f32_amx(const WeightArgs& args, int64_t begin, int64_t end, void* scratch) {
  args.split == 3 ? weight_gradient<SplitPairs<3>, float>(args, begin, end, scratch)
                  : weight_gradient<SplitPairs<2>, float>(args, begin, end, scratch);
}

}  // namespace fused_resnet::cpu
#endif  // FR_X86
