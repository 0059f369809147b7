// Which approximations of single precision the process and PyTorch allow the convolutions now: docs/numerics.md.
#include <ATen/Context.h>

#include <atomic>

#include "bindings/conv_problem.h"

namespace fused_resnet::bindings {
namespace {

std::atomic<bool> winograd_allowed{true};
// kAutomatic: where it was measured to be faster.
enum class Split : uint8_t { kAutomatic, kAlways, kNever };
std::atomic<Split> split_floats{Split::kAutomatic};

// Whether bfloat16 or TF32 may stand for fp32: torch.backends.mkldnn.conv.fp32_precision where it says anything, else
// torch.set_float32_matmul_precision(). at::Context::float32MatmulPrecision() would refuse a mix of both.
bool reduced_precision() {
  using Precision = at::Float32Precision;
  const auto asked = [](at::Float32Op op) {
    return at::globalContext().float32Precision(at::Float32Backend::MKLDNN, op);
  };
  const auto reduced = [](Precision p) { return p == Precision::TF32 || p == Precision::BF16; };
  const Precision conv = asked(at::Float32Op::CONV);
  return reduced(conv) || (conv != Precision::IEEE && reduced(asked(at::Float32Op::MATMUL)));
}

}  // namespace

void set_winograd(bool allowed) { winograd_allowed.store(allowed, std::memory_order_relaxed); }
bool winograd() { return winograd_allowed.load(std::memory_order_relaxed); }
void set_split_bfloat16(std::optional<bool> allowed) {
  split_floats.store(!allowed   ? Split::kAutomatic
                     : *allowed ? Split::kAlways
                                : Split::kNever,
                     std::memory_order_relaxed);
}
std::optional<bool> split_bfloat16() {
  const Split split = split_floats.load(std::memory_order_relaxed);
  return split == Split::kAutomatic ? std::nullopt : std::optional(split == Split::kAlways);
}
ConvNumerics numerics() {
  const Split split = split_floats.load(std::memory_order_relaxed);
  if (split == Split::kNever) return {winograd(), 0};
  return {winograd(), reduced_precision() ? 2 : 3, split == Split::kAutomatic};
}

}  // namespace fused_resnet::bindings
