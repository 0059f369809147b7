// Oracle of emulation_test.cpp: apart, because <immintrin.h> and the emulation
// do not go into one file.
#pragma once

#include <cstdint>

namespace hardware {

float larger(float a, float b);
float smaller(float a, float b);
int32_t to_int32(float a);
bool equal(float a, float b);
bool not_less_or_equal(float a, float b);
bool greater(float a, float b);
bool unordered(float a, float b);

}  // namespace hardware
