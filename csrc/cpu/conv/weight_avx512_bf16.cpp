// Weight gradient of a convolution: AVX-512 with the CPU's own bfloat16 products, two pixels a step.
#include "conv/weight_kernels.h"
#include "isa.h"

#if FR_X86
#define FR_AVX512_BF16 1
#include "simd/intrinsics.h"

namespace fused_resnet::cpu {
namespace {
#include "conv/weight_body.h"
#include "simd/vec_avx512.h"

struct Bf16Dot {
  using I = Avx512Float;
  using Unit = uint32_t;  // the first pixel's value in the low half
  using V = __m512i;
  static constexpr int kPair = 2, kWidth = I::kWidth, kMr = kWeightBf16Avx512Bf16.filters, kNr = 2;
  static V load(const Unit* p) { return _mm512_loadu_si512(p); }
  static void store(Unit* p, V v) { _mm512_storeu_si512(p, v); }
  static V broadcast(const Unit* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  static I::V multiply_add(V x, V y, I::V sum) {
    return _mm512_dpbf16_ps(sum, bit_copy<__m512bh>(x), bit_copy<__m512bh>(y));
  }
  // The products take denormals for zero, so it does not matter that this conversion does.
  static void pack(Unit* p, I::V v, I::V w) {
    const __m512i halves = bit_copy<__m512i>(_mm512_cvtne2ps_pbh(w, v));
    static constexpr uint16_t kLane[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_loadu_si512(kLane), halves));
  }
};
}  // namespace

void conv_weight_gradient_bf16_avx512_bf16(const WeightArgs& args, int64_t begin, int64_t end, void* scratch) {
  weight_gradient<Bf16Dot, BFloat16>(args, begin, end, scratch);
}

}  // namespace fused_resnet::cpu
#endif  // FR_X86
