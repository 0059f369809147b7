// Convolution kernels: AMX tiles of bfloat16.
#include "conv/kernels.h"
#include "isa.h"

#if FR_X86
#define FR_AVX512_BF16 1
#include "simd/intrinsics.h"

namespace fused_resnet::cpu {
namespace {
#include "conv/kernel_body.h"
#include "conv/split_body.h"
#include "simd/amx_tile.h"
}  // namespace

void conv_bf16_amx(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  convolve<AmxDot, BFloat16, 32>(a, begin, end, scratch);
}
void conv_pack_bf16_amx(const ConvPackArgs& a, int64_t begin, int64_t end) {
  pack_weight<AmxDot, BFloat16>(a, begin, end);
}

void conv_f32_amx(const ConvArgs& a, int64_t begin, int64_t end, void* scratch) {
  convolve_split(a, begin, end, scratch);
}
void conv_pack_f32_amx(const ConvPackArgs& a, int64_t begin, int64_t end) { pack_split_weight(a, begin, end); }

bool amx_works() {
  constexpr int kRows = 32, kChannels = 32, kFilters = 32;
  BFloat16 a[kRows * kChannels], b[kChannels * kFilters];
  for (int i = 0; i < kRows * kChannels; ++i) a[i] = to_bfloat16(static_cast<float>(i % 7 - 3));
  for (int i = 0; i < kChannels * kFilters; ++i) b[i] = to_bfloat16(static_cast<float>(i % 5 - 2));
  float sums[kRows * kFilters];
  TapOffsets taps;
  taps.rows = taps.cols = 1;
  {
    AmxState state;
    state.set_rows(kRows);
    multiply_tiles<2>(kRows, taps, a, kChannels, b, kChannels, sums);
  }
  for (int i = 0; i < kRows; ++i) {
    for (int f = 0; f < kFilters; ++f) {
      float expected = 0;
      for (int c = 0; c < kChannels; ++c) {
        expected += to_float(a[i * kChannels + c]) * to_float(b[(c / 2 * kFilters + f) * 2 + c % 2]);
      }
      if (sums[i * kFilters + f] != expected) return false;
    }
  }
  return true;
}

}  // namespace fused_resnet::cpu
#endif  // FR_X86
