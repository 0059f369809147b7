// Is the emulation itself right? Against the processor's scalar instructions, the
// compiler's own half type, and hand-made cases of the Intrinsics Guide.
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <limits>
#include <vector>

#include "../check.h"
#include "amx_emulation.h"
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

void check_permutations(Report& report) {
  report.begin("lanes are permuted by the lowest bits of an index");
  std::array<uint32_t, 16> index;
  std::array<float, 16> values;
  for (uint32_t i = 0; i < 16; ++i) index[i] = 16 * i + 7 * i % 16, values[i] = static_cast<float>(i) + 0.5f;
  const auto got = lanes<float>(_mm512_permutexvar_ps(from_lanes<__m512i>(index), from_lanes<__m512>(values)));
  const auto words = lanes<uint32_t>(_mm512_permutexvar_epi32(from_lanes<__m512i>(index), from_lanes<__m512i>(index)));
  for (size_t i = 0; i < 16; ++i) {
    if (got[i] != values[7 * i % 16] || words[i] != index[7 * i % 16]) report.fail("lane %d", static_cast<int>(i));
  }
  const auto half =
      lanes<uint32_t>(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(index.data()))));
  for (size_t i = 0; i < 8; ++i) {
    if (half[i] != index[i]) report.fail("castsi256 lane %d", static_cast<int>(i));
  }
}

// bfloat16 of every kind, and floats to add their products to.
void check_dot_products(Report& report) {
  if (!hardware::has_bfloat16()) {
    report.skip("products of bfloat16", "this processor does not have AVX512_BF16");
    return;
  }
  report.begin("products and pairs of bfloat16, and what joins two vectors, as this processor has them");
  uint64_t state = 1;
  const auto next = [&state] { return static_cast<uint32_t>((state = state * 6364136223846793005u + 1) >> 33); };
  for (int round = 0; round < 40000; ++round) {
    std::array<uint16_t, 32> a, b;
    std::array<float, 16> sum, high;
    for (size_t i = 0; i < 32; ++i) {
      a[i] = static_cast<uint16_t>(next() >> 8), b[i] = static_cast<uint16_t>(next() >> 8);
      if (round % 2 == 0) {  // near one, so that sums round
        a[i] = static_cast<uint16_t>((a[i] & 0x80ff) | 0x3f00), b[i] = static_cast<uint16_t>((b[i] & 0x80ff) | 0x3f00);
      }
    }
    for (size_t i = 0; i < 16; ++i) {
      sum[i] = round % 2 == 0 ? static_cast<float>(next()) * 0x1p-30f - 1 : std::bit_cast<float>(next() << 1);
      high[i] = kSpecials[next() % kSpecials.size()];
    }
    std::array<float, 16> expected;
    hardware::dot_products(a.data(), b.data(), sum.data(), expected.data());
    const auto got =
        lanes<float>(_mm512_dpbf16_ps(from_lanes<__m512>(sum), from_lanes<__m512bh>(a), from_lanes<__m512bh>(b)));
    for (size_t i = 0; i < 16; ++i) {
      if (!same(got[i], expected[i])) report.fail("sum %a: %a, expected %a", sum[i], got[i], expected[i]);
    }
    std::array<uint16_t, 32> pairs;
    hardware::narrow_two(high.data(), sum.data(), pairs.data());
    if (lanes<uint16_t>(_mm512_cvtne2ps_pbh(from_lanes<__m512>(high), from_lanes<__m512>(sum))) != pairs) {
      report.fail("cvtne2ps");
    }
    std::array<float, 16> smaller;
    hardware::smaller_magnitude(high.data(), sum.data(), smaller.data());
    const auto range = lanes<float>(_mm512_range_ps(from_lanes<__m512>(high), from_lanes<__m512>(sum), 0b1010));
    for (size_t i = 0; i < 16; ++i) {
      if (!same(range[i], smaller[i])) report.fail("range %a, %a: %a", high[i], sum[i], range[i]);
    }
    std::array<uint16_t, 16> half;
    hardware::upper_half(a.data(), half.data());
    if (lanes<uint16_t>(_mm512_extracti64x4_epi64(from_lanes<__m512i>(a), 1)) != half) report.fail("extracti64x4");
    hardware::permute(a.data(), b.data(), pairs.data());
    if (lanes<uint16_t>(_mm512_permutexvar_epi16(from_lanes<__m512i>(a), from_lanes<__m512i>(b))) != pairs) {
      report.fail("permutexvar");
    }
    uint32_t combined[6][16];
    hardware::combine(a.data(), b.data(), combined);
    const __m512i va = from_lanes<__m512i>(a), vb = from_lanes<__m512i>(b);
    const __m512i emulated[] = {_mm512_max_epu32(va, vb),      _mm512_min_epu32(va, vb),
                                _mm512_unpacklo_epi32(va, vb), _mm512_unpackhi_epi32(va, vb),
                                _mm512_unpacklo_epi64(va, vb), _mm512_unpackhi_epi64(va, vb)};
    if (std::memcmp(emulated, combined, sizeof combined) != 0) report.fail("lanes of a and b");
  }
}

// This processor has no AMX to ask: by hand.
void check_tiles(Report& report) {
  report.begin("a tile takes its rows and bytes, and no more");
  std::array<unsigned char, 64> config{};
  config[0] = 1;
  const auto configure = [&](int tile, int rows, int row_bytes) {
    config[static_cast<size_t>(16 + 2 * tile)] = static_cast<unsigned char>(row_bytes);
    config[static_cast<size_t>(48 + tile)] = static_cast<unsigned char>(rows);
  };
  configure(0, 3, 8), configure(1, 3, 12), configure(2, 3, 8);  // 3 x 2 floats = (3 x 3 pairs) * (3 pairs x 2)
  _tile_loadconfig(config.data());
  constexpr int kStride = 20;  // bytes from row to row
  const auto bfloat16 = [](float v) { return avx512_emulation::bfloat16_from_float(v); };
  // To the last byte: reading more trips AddressSanitizer.
  std::vector<unsigned char> a(2 * kStride + 12), b(2 * kStride + 8), c(2 * kStride + 8, 0xee);
  float expected[3][2] = {}, x[3][6], y[3][4];
  for (int m = 0; m < 3; ++m) {
    for (int k = 0; k < 6; ++k) {
      x[m][k] = static_cast<float>(m * 6 + k - 7);
      const uint16_t value = bfloat16(x[m][k]);
      std::memcpy(a.data() + m * kStride + 2 * k, &value, 2);
    }
    for (int n = 0; n < 4; ++n) {
      y[m][n] = static_cast<float>(3 - m * n);
      const uint16_t value = bfloat16(y[m][n]);
      std::memcpy(b.data() + m * kStride + 2 * n, &value, 2);
    }
  }
  for (int m = 0; m < 3; ++m)
    for (int n = 0; n < 2; ++n)
      for (int k = 0; k < 6; ++k) expected[m][n] += 2 * x[m][k] * y[k / 2][2 * n + k % 2];
  _tile_zero(0);
  _tile_loadd(1, a.data(), kStride);
  _tile_loadd(2, b.data(), kStride);
  _tile_dpbf16ps(0, 1, 2);
  _tile_dpbf16ps(0, 1, 2);  // onto the first
  _tile_stored(0, c.data(), kStride);
  for (int m = 0; m < 3; ++m) {
    for (int n = 0; n < 2; ++n) {
      float got;
      std::memcpy(&got, c.data() + m * kStride + 4 * n, 4);
      if (got != expected[m][n]) report.fail("product %d %d = %g, expected %g", m, n, got, expected[m][n]);
    }
  }
  for (size_t i = 0; i < c.size(); ++i) {
    if (i % kStride >= 8 && c[i] != 0xee) report.fail("byte %zu was written", i);
  }

  const auto ends = [&](const char* what, auto f) {
    report.begin(what);
    const pid_t child = fork();
    if (child == 0) {
      std::freopen("/dev/null", "w", stderr);
      std::signal(SIGABRT, SIG_DFL);
      f();
      _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGABRT) report.fail("went on");
  };
  ends("a tile without rows ends the program", [] { _tile_zero(3); });
  ends("tiles that do not fit end the program", [] { _tile_dpbf16ps(0, 2, 1); });
  ends("the same tile twice ends the program", [] { _tile_dpbf16ps(0, 1, 1); });
  ends("seventeen rows end the program", [&] {
    configure(1, 17, 64);
    _tile_loadconfig(config.data());
  });
  _tile_release();
  ends("no configuration ends the program", [] { _tile_zero(0); });
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
  check_permutations(report);
  check_dot_products(report);
  check_tiles(report);
  return report.finish();
}
