// The processor's own answers, from the scalar SSE forms of the same instructions.
#include "hardware.h"

#include <immintrin.h>

namespace hardware {

float larger(float a, float b) { return _mm_cvtss_f32(_mm_max_ss(_mm_set_ss(a), _mm_set_ss(b))); }
float smaller(float a, float b) { return _mm_cvtss_f32(_mm_min_ss(_mm_set_ss(a), _mm_set_ss(b))); }
int32_t to_int32(float a) { return _mm_cvtss_si32(_mm_set_ss(a)); }
bool equal(float a, float b) { return _mm_comieq_ss(_mm_set_ss(a), _mm_set_ss(b)) != 0 && a == a && b == b; }

bool not_less_or_equal(float a, float b) {
  return (_mm_movemask_ps(_mm_cmpnle_ss(_mm_set_ss(a), _mm_set_ss(b))) & 1) != 0;
}
bool greater(float a, float b) { return (_mm_movemask_ps(_mm_cmpgt_ss(_mm_set_ss(a), _mm_set_ss(b))) & 1) != 0; }
bool unordered(float a, float b) { return (_mm_movemask_ps(_mm_cmpunord_ss(_mm_set_ss(a), _mm_set_ss(b))) & 1) != 0; }

}  // namespace hardware
