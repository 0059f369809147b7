// Whole parts of a count, for whoever cuts a problem.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fused_resnet::cpu {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
// The size of equal parts of `count` that are no larger than `limit`.
inline int64_t even_part(int64_t count, int64_t limit) {
  return divide_up(count, divide_up(count, std::max<int64_t>(limit, 1)));
}

}  // namespace fused_resnet::cpu
