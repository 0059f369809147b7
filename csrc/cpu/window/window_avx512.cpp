// Pooling over windows: AVX-512 F, BW, DQ and VL.
#include "isa.h"
#include "window/kernels.h"

#if FR_X86
#include "simd/intrinsics.h"

namespace fused_resnet::cpu {
namespace {
#include "simd/vec_avx512.h"
#include "window/kernel_body.h"
}  // namespace

void window_max_f32_avx512(const WindowArgs& a, int64_t begin, int64_t end) {
  window<Avx512Float, float, WindowKind::kMax>(a, begin, end);
}
void window_mean_f32_avx512(const WindowArgs& a, int64_t begin, int64_t end) {
  window<Avx512Float, float, WindowKind::kMean>(a, begin, end);
}
void window_max_bf16_avx512(const WindowArgs& a, int64_t begin, int64_t end) {
  window<Avx512Float, BFloat16, WindowKind::kMax>(a, begin, end);
}
void window_mean_bf16_avx512(const WindowArgs& a, int64_t begin, int64_t end) {
  window<Avx512Float, BFloat16, WindowKind::kMean>(a, begin, end);
}
void window_max_f16_avx512(const WindowArgs& a, int64_t begin, int64_t end) {
  window<Avx512Float, Float16, WindowKind::kMax>(a, begin, end);
}
void window_mean_f16_avx512(const WindowArgs& a, int64_t begin, int64_t end) {
  window<Avx512Float, Float16, WindowKind::kMean>(a, begin, end);
}

}  // namespace fused_resnet::cpu
#endif  // FR_X86
