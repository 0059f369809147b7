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

namespace {

constexpr int kRows = 32, kChannels = 32, kFilters = 32;

// Small whole numbers: their sums are exact.
bool multiplies_whole_numbers() {
  BFloat16 a[kRows * kChannels], b[kChannels * kFilters];
  for (int i = 0; i < kRows * kChannels; ++i) a[i] = to_bfloat16(static_cast<float>(i % 7 - 3));
  for (int i = 0; i < kChannels * kFilters; ++i) b[i] = to_bfloat16(static_cast<float>(i % 5 - 2));
  float sums[kRows * kFilters];
  TapOffsets taps;
  taps.rows = taps.cols = 1;
  {
    AmxState state;
    state.set_rows(kRows);
    multiply_tiles<2>(kRows, taps, a, kChannels, b, kChannels, sums, {});
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

// Floats as sums of bfloat16, whose error depends on what the tiles do with the low parts.
bool multiplies_floats() {
  constexpr double kMostError = 0x1p-20;
  alignas(64) float x[kRows * kChannels], weight[kFilters * kChannels], y[kRows * kFilters];
  for (int i = 0; i < kRows * kChannels; ++i)
    x[i] = static_cast<float>(i % 97 - 48) / 7 + 1.0f / static_cast<float>(i + 3);
  for (int i = 0; i < kFilters * kChannels; ++i) weight[i] = static_cast<float>(i % 89 - 44) / 11;
  alignas(64) BFloat16 panels[3 * kChannels * kFilters];
  alignas(64) char scratch[64 * 1024];
  uint8_t unsafe[1] = {};
  ConvPackArgs w;
  w.weight = weight;
  w.stride_out = kChannels;
  w.stride_in = 1;
  w.outs = kFilters;
  w.ins = kChannels;
  w.rows = w.cols = 1;
  w.split = 3;
  w.panels = panels;
  w.unsafe = unsafe;
  pack_split_weight(w, 0, 1);
  ConvArgs g;
  g.a.data = x;
  g.a.n = g.a.h = 1;
  g.a.w = g.ow = g.y_w = g.block_w = kRows;
  g.a.c = g.c_padded = g.group_c = kChannels;
  g.rows = g.cols = 1;
  g.oh = g.y_h = g.units = 1;
  g.split = 3;
  g.raw = &w;
  g.weight = panels;
  g.k = g.k_padded = kFilters;
  g.y = y;
  convolve_split(g, 0, 1, scratch);
  for (int i = 0; i < kRows; ++i) {
    for (int f = 0; f < kFilters; ++f) {
      double expected = 0, size = 0;
      for (int c = 0; c < kChannels; ++c) {
        const double product =
            static_cast<double>(x[i * kChannels + c]) * static_cast<double>(weight[f * kChannels + c]);
        expected += product;
        size += product < 0 ? -product : product;
      }
      const double error = expected - static_cast<double>(y[i * kFilters + f]);
      if (!((error < 0 ? -error : error) <= kMostError * size)) return false;
    }
  }
  return true;
}

}  // namespace

bool amx_works() { return multiplies_whole_numbers() && multiplies_floats(); }

}  // namespace fused_resnet::cpu
#endif  // FR_X86
