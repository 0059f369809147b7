// Stem kernels: One lane at a time, for any CPU.
#include "kernels.h"

namespace fused_resnet::cpu {
namespace {
#include "pool/kernel_body.h"
}  // namespace

void pool_forward_f64_scalar(const PoolArgs& a, int64_t begin, int64_t end) {
  forward<ScalarOps<double>, double>(a, begin, end);
}
void pool_backward_reduce_f64_scalar(const PoolArgs& a, int64_t begin, int64_t end) {
  backward_reduce<ScalarOps<double>, double>(a, begin, end);
}
void pool_backward_apply_f64_scalar(const PoolArgs& a, int64_t begin, int64_t end) {
  backward_apply<ScalarOps<double>, double>(a, begin, end);
}

void pool_forward_f32_scalar(const PoolArgs& a, int64_t begin, int64_t end) {
  forward<ScalarOps<float>, float>(a, begin, end);
}
void pool_backward_reduce_f32_scalar(const PoolArgs& a, int64_t begin, int64_t end) {
  backward_reduce<ScalarOps<float>, float>(a, begin, end);
}
void pool_backward_apply_f32_scalar(const PoolArgs& a, int64_t begin, int64_t end) {
  backward_apply<ScalarOps<float>, float>(a, begin, end);
}

void pool_forward_bf16_scalar(const PoolArgs& a, int64_t begin, int64_t end) {
  forward<ScalarOps<float>, BFloat16>(a, begin, end);
}
void pool_backward_reduce_bf16_scalar(const PoolArgs& a, int64_t begin, int64_t end) {
  backward_reduce<ScalarOps<float>, BFloat16>(a, begin, end);
}
void pool_backward_apply_bf16_scalar(const PoolArgs& a, int64_t begin, int64_t end) {
  backward_apply<ScalarOps<float>, BFloat16>(a, begin, end);
}

void pool_forward_f16_scalar(const PoolArgs& a, int64_t begin, int64_t end) {
  forward<ScalarOps<float>, Float16>(a, begin, end);
}
void pool_backward_reduce_f16_scalar(const PoolArgs& a, int64_t begin, int64_t end) {
  backward_reduce<ScalarOps<float>, Float16>(a, begin, end);
}
void pool_backward_apply_f16_scalar(const PoolArgs& a, int64_t begin, int64_t end) {
  backward_apply<ScalarOps<float>, Float16>(a, begin, end);
}

}  // namespace fused_resnet::cpu
