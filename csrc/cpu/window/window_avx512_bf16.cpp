// Pooling over windows: AVX-512 with the CPU's own float to bfloat16 conversion.
#include "isa.h"
#include "window/kernels.h"

#if FR_X86
#define FR_AVX512_BF16 1
#include "simd/intrinsics.h"

namespace fused_resnet::cpu {
namespace {
#include "simd/vec_avx512.h"
#include "window/kernel_body.h"
}  // namespace

void window_max_bf16_avx512_bf16(const WindowArgs& a, int64_t begin, int64_t end) {
  window<Avx512Float, BFloat16, WindowKind::kMax>(a, begin, end);
}
void window_mean_bf16_avx512_bf16(const WindowArgs& a, int64_t begin, int64_t end) {
  window<Avx512Float, BFloat16, WindowKind::kMean>(a, begin, end);
}

}  // namespace fused_resnet::cpu
#endif  // FR_X86
