// Batch-norm kernels: One lane at a time, for any CPU.
#include "kernels.h"

namespace fused_resnet::cpu {
namespace {
#include "batch_norm/kernel_body.h"
}  // namespace

void bn_stats_f64_scalar(const BnArgs& a, int64_t begin, int64_t end) {
  stats<ScalarOps<double>, double>(a, begin, end);
}
void bn_apply_f64_scalar(const BnArgs& a, int64_t begin, int64_t end) {
  apply<ScalarOps<double>, double>(a, begin, end);
}
void bn_backward_reduce_f64_scalar(const BnArgs& a, int64_t begin, int64_t end) {
  backward_reduce<ScalarOps<double>, double>(a, begin, end);
}
void bn_backward_apply_f64_scalar(const BnArgs& a, int64_t begin, int64_t end) {
  backward_apply<ScalarOps<double>, double>(a, begin, end);
}

void bn_stats_f32_scalar(const BnArgs& a, int64_t begin, int64_t end) { stats<ScalarOps<float>, float>(a, begin, end); }
void bn_apply_f32_scalar(const BnArgs& a, int64_t begin, int64_t end) { apply<ScalarOps<float>, float>(a, begin, end); }
void bn_backward_reduce_f32_scalar(const BnArgs& a, int64_t begin, int64_t end) {
  backward_reduce<ScalarOps<float>, float>(a, begin, end);
}
void bn_backward_apply_f32_scalar(const BnArgs& a, int64_t begin, int64_t end) {
  backward_apply<ScalarOps<float>, float>(a, begin, end);
}

void bn_stats_bf16_scalar(const BnArgs& a, int64_t begin, int64_t end) {
  stats<ScalarOps<float>, BFloat16>(a, begin, end);
}
void bn_apply_bf16_scalar(const BnArgs& a, int64_t begin, int64_t end) {
  apply<ScalarOps<float>, BFloat16>(a, begin, end);
}
void bn_backward_reduce_bf16_scalar(const BnArgs& a, int64_t begin, int64_t end) {
  backward_reduce<ScalarOps<float>, BFloat16>(a, begin, end);
}
void bn_backward_apply_bf16_scalar(const BnArgs& a, int64_t begin, int64_t end) {
  backward_apply<ScalarOps<float>, BFloat16>(a, begin, end);
}

void bn_stats_f16_scalar(const BnArgs& a, int64_t begin, int64_t end) {
  stats<ScalarOps<float>, Float16>(a, begin, end);
}
void bn_apply_f16_scalar(const BnArgs& a, int64_t begin, int64_t end) {
  apply<ScalarOps<float>, Float16>(a, begin, end);
}
void bn_backward_reduce_f16_scalar(const BnArgs& a, int64_t begin, int64_t end) {
  backward_reduce<ScalarOps<float>, Float16>(a, begin, end);
}
void bn_backward_apply_f16_scalar(const BnArgs& a, int64_t begin, int64_t end) {
  backward_apply<ScalarOps<float>, Float16>(a, begin, end);
}

}  // namespace fused_resnet::cpu
