// Is the emulation itself right? Against the processor's scalar instructions, the
// compiler's own half type, and hand-made cases of the Intrinsics Guide.
#include <limits>
#include <vector>

#include "../check.h"
#include "avx512_emulation.h"
#include "hardware.h"

namespace {

using avx512_emulation::from_lanes;
using avx512_emulation::lanes;
using fused_resnet::native_test::Report;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Every kind of float: zeros, subnormals, ties, limits, infinities, NaN.
const std::vector<float> kSpecials = {0.0f,    -0.0f, 1e-45f,   -1e-45f, 1e-40f, 1.1754944e-38f, 0.5f,  -0.5f,
                                      1.0f,    -1.0f, 1.5f,     2.5f,    -2.5f,  65504.0f,       1e30f, 65519.996f,
                                      65520.f, 3e38f, -3.4e38f, kInf,    -kInf,  kNan,           -kNan, 2147483648.0f};

uint32_t bits_of(float a) { return std::bit_cast<uint32_t>(a); }
bool same(float a, float b) { return bits_of(a) == bits_of(b) || (a != a && b != b); }

// The value in lane 3, sentinels elsewhere: a result that leaks across lanes shows.
__m512 in_lane_3(float a) {
  auto v = lanes<float>(_mm512_set1_ps(7.0f));
  v[3] = a;
  return from_lanes<__m512>(v);
}
float lane_3(__m512 v) { return lanes<float>(v)[3]; }

void check_pairs(Report& report) {
  report.begin("max, min and comparisons of all pairs of special values");
  for (float a : kSpecials) {
    for (float b : kSpecials) {
      const __m512 va = in_lane_3(a), vb = in_lane_3(b);
      if (!same(lane_3(_mm512_max_ps(va, vb)), hardware::larger(a, b))) report.fail("max(%g, %g)", a, b);
      if (!same(lane_3(_mm512_min_ps(va, vb)), hardware::smaller(a, b))) report.fail("min(%g, %g)", a, b);
      auto lane_mask = [&](int predicate) { return ((_mm512_cmp_ps_mask(va, vb, predicate) >> 3) & 1) != 0; };
      if (lane_mask(_CMP_GT_OQ) != hardware::greater(a, b)) report.fail("GT(%g, %g)", a, b);
      if (lane_mask(_CMP_NLE_UQ) != hardware::not_less_or_equal(a, b)) report.fail("NLE(%g, %g)", a, b);
      if (lane_mask(_CMP_UNORD_Q) != hardware::unordered(a, b)) report.fail("UNORD(%g, %g)", a, b);
      if (lane_mask(_CMP_EQ_OQ) != hardware::equal(a, b)) report.fail("EQ(%g, %g)", a, b);
      if (lane_mask(_CMP_LE_OQ) == hardware::not_less_or_equal(a, b)) report.fail("LE(%g, %g)", a, b);
    }
  }
}

void check_half(Report& report) {
  report.begin("half to float, all 65536");
  for (uint32_t h = 0; h < 65536; ++h) {
    const float expected = static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(h)));
    const auto v = from_lanes<__m256i>(std::array<uint16_t, 16>{0, 0, 0, static_cast<uint16_t>(h)});
    if (!same(lane_3(_mm512_cvtph_ps(v)), expected)) report.fail("half %04x", h);
  }
  report.begin("float to half, every float with 13 leading mantissa bits and its neighbours");
  for (uint32_t top = 0; top < (1u << 22); ++top) {
    for (uint32_t low : {0u, 1u, 0x1ffu, 0x200u}) {  // exact, above, just under, and half of a step
      const float a = std::bit_cast<float>((top << 10) | low);
      const uint16_t expected = std::bit_cast<uint16_t>(static_cast<_Float16>(a));
      const uint16_t got = avx512_emulation::half_from_float(a);
      const bool both_nan = a != a && (got & 0x7fff) > 0x7c00;
      if (got != expected && !both_nan) report.fail("%08x: %04x, expected %04x", bits_of(a), got, expected);
    }
  }
}

void check_bfloat16(Report& report) {
  report.begin("float to bfloat16");
  for (uint32_t high = 0; high < 65536; ++high) {
    for (uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      const float a = std::bit_cast<float>((high << 16) | low);
      const uint16_t got = lanes<uint16_t>(_mm512_cvtneps_pbh(in_lane_3(a)))[3];
      const float value = std::bit_cast<float>(static_cast<uint32_t>(got) << 16);
      if (a != a) {
        if (value == value) report.fail("NaN became %g", value);
        continue;
      }
      // The nearest of the two neighbours, the even one when tied; no subnormals.
      const bool up = low > 0x8000u || (low == 0x8000u && (high & 1) != 0);
      const bool subnormal = (high & 0x7f80) == 0;
      const uint32_t expected = subnormal ? high & 0x8000 : high + (up ? 1 : 0);
      if (got != expected) report.fail("%08x: %04x, expected %04x", bits_of(a), got, expected);
    }
  }
}

void check_classes(Report& report) {
  report.begin("denormals are told from all others");
  for (float a : kSpecials) {
    const bool denormal = a != 0 && a > -0x1p-126f && a < 0x1p-126f;
    if (_mm512_fpclass_ps_mask(in_lane_3(a), 0x20) != (denormal ? 8 : 0)) report.fail("fpclass(%g)", a);
  }
}

void check_arithmetic(Report& report) {
  report.begin("fma rounds once, keeps -0.0, and NaN");
  const float tiny = 0x1p-12f;  // (1 + tiny)^2 - (1 + 2 tiny) = tiny^2, lost when the product is rounded
  const __m512 one_tiny = in_lane_3(1 + tiny);
  if (lane_3(_mm512_fmadd_ps(one_tiny, one_tiny, in_lane_3(-(1 + 2 * tiny)))) != tiny * tiny) report.fail("fmadd");
  if (lane_3(_mm512_fnmadd_ps(one_tiny, one_tiny, in_lane_3(1 + 2 * tiny))) != -tiny * tiny) report.fail("fnmadd");
  if (!std::signbit(lane_3(_mm512_fmadd_ps(in_lane_3(-0.0f), in_lane_3(1), in_lane_3(-0.0f))))) report.fail("-0.0");
  if (!std::isnan(lane_3(_mm512_fmadd_ps(in_lane_3(0), in_lane_3(kInf), in_lane_3(1))))) report.fail("0 * inf + 1");

  report.begin("roundscale, scalef, conversions to integers");
  for (float a : kSpecials) {
    const float rounded = lane_3(_mm512_roundscale_ps(in_lane_3(a), _MM_FROUND_NO_EXC));
    if (!same(rounded, std::nearbyint(a))) report.fail("roundscale(%g) = %g", a, rounded);
    if (lanes<int32_t>(_mm512_cvtps_epi32(in_lane_3(a)))[3] != hardware::to_int32(a)) report.fail("cvtps(%g)", a);
  }
  struct Scale {
    float a, b, expected;
  };
  for (const Scale& s : {Scale{1.5f, 3.0f, 12.0f},
                         {1.5f, -1.5f, 0.375f},
                         {-1.0f, 200.0f, -kInf},
                         {1.0f, -126.0f, 0x1p-126f},
                         {-1.0f, -kInf, -0.0f},
                         {2.0f, kInf, kInf},
                         {0.0f, kInf, kNan},
                         {kNan, 1.0f, kNan},
                         {1.0f, kNan, kNan}}) {
    const float got = lane_3(_mm512_scalef_ps(in_lane_3(s.a), in_lane_3(s.b)));
    if (!same(got, s.expected)) report.fail("scalef(%g, %g) = %g, expected %g", s.a, s.b, got, s.expected);
  }

  report.begin("reduce_add adds halves");
  std::array<float, 16> v{};
  v[0] = 1e8f, v[8] = -1e8f, v[1] = 1;  // left to right would give 0
  v[2] = 3, v[15] = 5;
  if (_mm512_reduce_add_ps(from_lanes<__m512>(v)) != 9.0f) report.fail("sum");
}

void check_masks(Report& report) {
  report.begin("masked moves touch their lanes only");
  alignas(64) float memory[16];
  for (int i = 0; i < 16; ++i) memory[i] = static_cast<float>(i);
  const __mmask16 mask = 0x8005;
  const auto loaded = lanes<float>(_mm512_maskz_loadu_ps(mask, memory));
  const auto merged = lanes<float>(_mm512_mask_loadu_ps(_mm512_set1_ps(-1), mask, memory));
  const auto chosen = lanes<float>(_mm512_mask_blend_ps(mask, _mm512_set1_ps(-1), _mm512_loadu_ps(memory)));
  _mm512_mask_storeu_ps(memory, mask, _mm512_set1_ps(99));
  for (int i = 0; i < 16; ++i) {
    const bool on = i == 0 || i == 2 || i == 15;
    if (loaded[i] != (on ? i : 0)) report.fail("maskz_loadu lane %d", i);
    if (merged[i] != (on ? i : -1)) report.fail("mask_loadu lane %d", i);
    if (chosen[i] != merged[i]) report.fail("blend lane %d", i);
    if (memory[i] != (on ? 99 : i)) report.fail("mask_storeu lane %d", i);
  }
  // One element on the heap: reading more than the masked lane trips AddressSanitizer.
  const std::vector<float> one = {42.0f};
  if (lanes<float>(_mm512_maskz_loadu_ps(1, one.data()))[0] != 42.0f) report.fail("single lane");
}

}  // namespace

int main() {
  Report report;
  check_pairs(report);
  check_half(report);
  check_bfloat16(report);
  check_classes(report);
  check_arithmetic(report);
  check_masks(report);
  return report.finish();
}
