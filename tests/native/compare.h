// Is a kernel's result within its error bound of the reference?
#pragma once

#include <algorithm>
#include <cmath>

#include "check.h"
#include "reference.h"

namespace fused_resnet::native_test {

// The bound: one rounding to the stored type, plus `units` roundings of the
// arithmetic's type on the sum of magnitudes. docs/numerics.md.
inline double bound(double value, double scale, DType stored, DType arithmetic, double units) {
  return 1.001 * rounding_unit(stored) * std::abs(value) + smallest_step(stored) +
         units * rounding_unit(arithmetic) * scale;
}

// Roundings of an element-wise formula with one transcendental function, and of a
// sum of n terms: a random walk. As in fused_resnet/testing.py.
constexpr double kElementUnits = 8;
inline double sum_units(int64_t n) { return kElementUnits + std::sqrt(static_cast<double>(n)); }

// Operands that a kernel rounds before it multiplies them: deviations of their sum, in roundings.
constexpr double kNoiseUnits = 4;

// The largest error seen, as a part of its bound: a bound that is never nearly
// reached tests little.
inline double& largest_part_of_bound() {
  static double largest = 0;
  return largest;
}

inline void expect_close(Report& report, const char* what, const Values& got, const Result& expected, DType stored,
                         DType arithmetic, double units) {
  if (got.size() != expected.value.size()) {
    report.fail("%s: %zu values, expected %zu", what, got.size(), expected.value.size());
    return;
  }
  for (size_t i = 0; i < got.size(); ++i) {
    const double limit = bound(expected.value[i], expected.scale[i], stored, arithmetic, units);
    const double error = std::abs(got[i] - expected.value[i]);
    if (error <= limit) {
      largest_part_of_bound() = std::max(largest_part_of_bound(), error / limit);
    } else {  // a NaN lands here too
      report.fail("%s[%zu] = %.9g, expected %.9g, error %.3g > %.3g", what, i, got[i], expected.value[i], error, limit);
    }
  }
}

inline void expect_guards(Report& report, const char* what, const Guarded& buffer) {
  if (!buffer.guards_intact()) report.fail("%s: written outside its bytes", what);
}

inline void expect_same_bytes(Report& report, const char* what, const Guarded& got, const Guarded& expected) {
  if (!got.same_bytes(expected)) report.fail("%s: other bytes than the serial run's", what);
}

}  // namespace fused_resnet::native_test
