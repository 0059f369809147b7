// Is a convolution's result within its error bound of the reference? And which runners and levels a case meets.
#pragma once

#include <algorithm>
#include <cstring>

#include "conv_case.h"
#include "fused_resnet/capability.h"
#include "runners.h"

namespace fused_resnet::native_test {

// What a level does with a case: where operands or products are rounded, the bound says so.
struct Level {
  CpuIsa isa;
  const ConvCase& k;
  ConvNumerics numerics{false, 0};  // where the kernels use them

  // Kernels that multiply bfloat16 round the operand that a prologue made; the others compute in the stat dtype.
  bool rounds() const { return k.shape.dtype == DType::kBFloat16 && isa >= CpuIsa::kAvx512Bf16; }
  double noise(int rounded_operands) const {
    // Two parts leave 2^-16 of an operand, and the product of the second ones is not computed.
    if (numerics.split == 2) return kNoiseUnits * 0x1p-16 * std::sqrt(3);
    return rounds() ? kNoiseUnits * rounding_unit(DType::kBFloat16) * std::sqrt(rounded_operands) : 0;
  }
};

// Winograd's F(4x4, 3x3): products of differences, of any of the 36 elements that a tile's result depends on.
constexpr double kWinogradUnits = 4;
// Of a tile's products 144 belong to a result; but 36 * 9 pairs are transformed together, for a weight gradient 36
// * 16.
constexpr double kWinogradWeightUnits = kWinogradUnits * 16 / 9;
inline bool winograd_possible(const ConvShape& s) {
  return s.dtype != DType::kFloat64 && s.groups == 1 && s.r == 3 && s.s == 3 && s.stride_h == 1 && s.stride_w == 1 &&
         s.dilation_h == 1 && s.dilation_w == 1;
}
// The magnitudes of a channel's largest sum stand for those of all the tile's; of a weight gradient those of a filter
// and channel's largest for all nine taps.
inline Terms winograd_terms(Terms terms, int64_t channels, double units = kWinogradUnits) {
  Values largest(static_cast<size_t>(channels), 0);
  for_elements(terms.value.size(), channels, [&](size_t i, int64_t c) {
    double& most = largest[static_cast<size_t>(c)];
    if (std::isfinite(terms.scale[i])) most = std::max(most, terms.scale[i]);
  });
  for_elements(terms.value.size(), channels, [&](size_t i, int64_t c) {
    if (std::isfinite(terms.scale[i])) terms.scale[i] = units * largest[static_cast<size_t>(c)];
  });
  return terms;
}

// All that make a difference.
inline std::vector<ConvNumerics> numerics_of(CpuIsa isa, const ConvShape& s) {
  std::vector<ConvNumerics> all{{false, 0}};
  if (winograd_possible(s)) all.push_back({true, 0});
  const bool splits = isa == CpuIsa::kAmx && s.dtype == DType::kFloat32 && s.groups == 1 && std::max(s.c, s.k) >= 32;
  if (splits) all.insert(all.end(), {{false, 3}, {false, 2}});
  return all;
}

enum class NotFinite { kSame, kAny };  // whether a NaN may stand for an infinity

// `noise`: of the operands' roundings, beside the bound that all kernels keep.
inline void expect_terms(Report& report, const char* what, const Values& got, const Terms& expected, DType stored,
                         DType stat, double units, double noise, NotFinite not_finite = NotFinite::kSame) {
  for (size_t i = 0; i < got.size(); ++i) {
    const double value = expected.value[i];
    if (!std::isfinite(value)) {
      const bool same = std::isnan(value) ? std::isnan(got[i]) : got[i] == value;
      const bool any = not_finite == NotFinite::kAny || std::isnan(expected.scale[i]);
      if (same || (any && !std::isfinite(got[i]))) continue;
      report.fail("%s[%zu] = %.9g, expected %.9g", what, i, got[i], value);
      continue;
    }
    const double limit = bound(value, expected.scale[i], stored, stat, units) + noise * expected.noise[i];
    const double error = std::abs(got[i] - value);
    if (!std::isfinite(limit)) continue;  // no claim is made
    if (error <= limit) {
      largest_part_of_bound() = std::max(largest_part_of_bound(), error / limit);
    } else {
      report.fail("%s[%zu] = %.9g, expected %.9g, error %.3g > %.3g", what, i, got[i], value, error, limit);
    }
  }
}

inline Values read_row(const Guarded& bytes, DType dtype) {
  return read_tensor(row_of(bytes.size() / element_size(dtype), dtype), bytes);
}

inline Guarded conv_output(const ConvCase& k, int64_t count) {
  return Guarded(count * element_size(k.shape.dtype), k.misaligned ? element_size(k.shape.dtype) : 0);
}
inline Guarded stat_output(const ConvCase& k, int64_t count) { return Guarded(count * element_size(k.stat())); }

inline void expect_all_guards(Report& report, const char* what, std::initializer_list<const Guarded*> buffers) {
  for (const Guarded* buffer : buffers) expect_guards(report, what, *buffer);
}

// Zeros of the padding may meet a factor that is not finite, or not: nothing is said of what would be finite then.
// `factor` is the weight in y and dx, dz in the gradient of the weight; channel_of(index in it) is of the result.
template <class F>
inline void no_claim_beside(const Result& factor, int64_t channels, F channel_of, Terms* terms) {
  const auto bad = std::find_if(factor.value.begin(), factor.value.end(), [](double v) { return !std::isfinite(v); });
  if (bad == factor.value.end()) return;
  const int64_t channel = channel_of(bad - factor.value.begin());
  for_elements(terms->value.size(), channels, [&](size_t i, int64_t c) {
    if (c == channel) terms->scale[i] = NAN;
  });
}

inline double sum_length_units(const ConvCase& k, bool forward) {
  return sum_units((forward ? k.shape.c : k.shape.k) / k.shape.groups * k.taps());
}

// Several threads cost time.
inline std::vector<Runner> runners(const ConvCase& k) {
  if (!k.threads) return {shuffled_runner()};
  return {threaded_runner<1>(), threaded_runner<2>(), threaded_runner<3>(), threaded_runner<5>(), shuffled_runner()};
}

// n, h, w, c, k, taps, stride, pad, dilation, groups
struct Extent {
  int64_t n, h, w, c, k, r, s, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1,
                               groups = 1;
  ConvShape shape(DType dtype) const {
    return {n, h, w, c, k, r, s, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, dtype};
  }
};

template <class E>
inline E pick(Random& random, int count) {
  return static_cast<E>(random.next() % static_cast<uint64_t>(count));
}

// Those of `all` that have kernels of their own.
inline std::vector<CpuIsa> own_levels(const std::vector<CpuIsa>& all, const char* op, DType dtype) {
  size_t count = 0;
  const KernelInfo* table = cpu::kernel_table(&count);
  std::vector<CpuIsa> levels;
  for (CpuIsa isa : all) {
    const auto ours = [&](const KernelInfo& row) {
      return std::strcmp(row.op, op) == 0 && row.dtype == dtype && row.isa == isa;
    };
    if (std::any_of(table, table + count, ours)) levels.push_back(isa);
  }
  return levels;
}

}  // namespace fused_resnet::native_test
