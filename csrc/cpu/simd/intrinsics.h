// AVX-512 intrinsics: the compiler's, or the emulation under tests/native that
// lets machines without AVX-512 run these very kernel files.
#pragma once

#ifdef FR_EMULATE_AVX512
#include "avx512_emulation.h"
#else
#include <immintrin.h>
#endif
