// Pooling over windows: any CPU, one lane at a time.
#include "window/kernels.h"

namespace fused_resnet::cpu {
namespace {
#include "window/kernel_body.h"
}  // namespace

void window_max_f64_scalar(const WindowArgs& a, int64_t begin, int64_t end) {
  window<ScalarOps<double>, double, WindowKind::kMax>(a, begin, end);
}
void window_mean_f64_scalar(const WindowArgs& a, int64_t begin, int64_t end) {
  window<ScalarOps<double>, double, WindowKind::kMean>(a, begin, end);
}
void window_max_f32_scalar(const WindowArgs& a, int64_t begin, int64_t end) {
  window<ScalarOps<float>, float, WindowKind::kMax>(a, begin, end);
}
void window_mean_f32_scalar(const WindowArgs& a, int64_t begin, int64_t end) {
  window<ScalarOps<float>, float, WindowKind::kMean>(a, begin, end);
}
void window_max_bf16_scalar(const WindowArgs& a, int64_t begin, int64_t end) {
  window<ScalarOps<float>, BFloat16, WindowKind::kMax>(a, begin, end);
}
void window_mean_bf16_scalar(const WindowArgs& a, int64_t begin, int64_t end) {
  window<ScalarOps<float>, BFloat16, WindowKind::kMean>(a, begin, end);
}
void window_max_f16_scalar(const WindowArgs& a, int64_t begin, int64_t end) {
  window<ScalarOps<float>, Float16, WindowKind::kMax>(a, begin, end);
}
void window_mean_f16_scalar(const WindowArgs& a, int64_t begin, int64_t end) {
  window<ScalarOps<float>, Float16, WindowKind::kMean>(a, begin, end);
}

}  // namespace fused_resnet::cpu
