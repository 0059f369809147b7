// Where a convolution without batch norms around it is left to ATen.
#include <algorithm>

#include "bindings/conv_problem.h"
#include "fused_resnet/capability.h"

namespace fused_resnet::bindings {

// Measured with AVX-512 on Zen 5 (bench/results/amd-epyc-avx512-bf16/conv-resnet50.json): direct convolutions that ours
// do 3% to 9% slower; in float on Emerald Rapids too, by up to 21% (bench/results/intel-xeon-amx). With batch norms to
// fuse ours gain more than that; on other instruction sets nothing is known.
bool aten_faster_alone(const ConvShape& s, cpu::ConvDirection direction) {
  constexpr int64_t kManyPositions = 2048;
  const CpuIsa isa = cpu::current_isa();
  const bool single = s.dtype == DType::kFloat32 && isa >= CpuIsa::kAvx512;
  const bool narrow = s.dtype == DType::kBFloat16 && isa == CpuIsa::kAvx512Bf16;
  if ((!single && !narrow) || s.groups != 1) return false;
  const auto is_direct = [&] { return cpu::conv_is_direct(s, direction, numerics()); };  // last: it makes a plan
  const bool forward = direction != cpu::ConvDirection::kBackwardData, strided = s.stride_h > 1 || s.stride_w > 1;
  const int64_t depth = forward ? s.c : s.k, positions = s.n * (forward ? s.out_h() * s.out_w() : s.h * s.w);
  if (s.r == 1 && s.s == 1) {
    // Few bfloat16 make short loops; many floats were slower with packed operands too.
    const bool slower = single ? std::max(s.c, s.k) >= 1024 : depth <= 128;
    return slower && !strided && positions >= kManyPositions && is_direct();
  }
  if (s.r != 3 || s.s != 3) return false;
  if (strided) return forward && s.c >= (single ? 256 : 128) && is_direct();
  return narrow && s.c >= 512 && s.h * s.w <= 49 && is_direct();
}

}  // namespace fused_resnet::bindings
