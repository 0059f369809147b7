// Pooling over windows: AVX2, FMA and F16C.
#include "isa.h"
#include "window/kernels.h"

#if FR_X86
#include <immintrin.h>

namespace fused_resnet::cpu {
namespace {
#include "simd/vec_avx2.h"
#include "window/kernel_body.h"
}  // namespace

void window_max_f64_avx2(const WindowArgs& a, int64_t begin, int64_t end) {
  window<Avx2Double, double, WindowKind::kMax>(a, begin, end);
}
void window_mean_f64_avx2(const WindowArgs& a, int64_t begin, int64_t end) {
  window<Avx2Double, double, WindowKind::kMean>(a, begin, end);
}
void window_max_f32_avx2(const WindowArgs& a, int64_t begin, int64_t end) {
  window<Avx2Float, float, WindowKind::kMax>(a, begin, end);
}
void window_mean_f32_avx2(const WindowArgs& a, int64_t begin, int64_t end) {
  window<Avx2Float, float, WindowKind::kMean>(a, begin, end);
}
void window_max_bf16_avx2(const WindowArgs& a, int64_t begin, int64_t end) {
  window<Avx2Float, BFloat16, WindowKind::kMax>(a, begin, end);
}
void window_mean_bf16_avx2(const WindowArgs& a, int64_t begin, int64_t end) {
  window<Avx2Float, BFloat16, WindowKind::kMean>(a, begin, end);
}
void window_max_f16_avx2(const WindowArgs& a, int64_t begin, int64_t end) {
  window<Avx2Float, Float16, WindowKind::kMax>(a, begin, end);
}
void window_mean_f16_avx2(const WindowArgs& a, int64_t begin, int64_t end) {
  window<Avx2Float, Float16, WindowKind::kMean>(a, begin, end);
}

}  // namespace fused_resnet::cpu
#endif  // FR_X86
