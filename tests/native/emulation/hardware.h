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

bool has_bfloat16();  // AVX512_BF16; what follows needs it. Lanes: 32 of uint16_t, 16 of float.
void dot_products(const uint16_t* a, const uint16_t* b, const float* sum, float* out);
void narrow_two(const float* high, const float* low, uint16_t* out);
void smaller_magnitude(const float* a, const float* b, float* out);
void upper_half(const uint16_t* v, uint16_t* out);  // 16 lanes
void permute(const uint16_t* index, const uint16_t* v, uint16_t* out);
// Sixteen each: the larger, the smaller; lower and upper lanes in turn, of four bytes and of eight.
void combine(const uint16_t* a, const uint16_t* b, uint32_t (*out)[16]);

}  // namespace hardware
