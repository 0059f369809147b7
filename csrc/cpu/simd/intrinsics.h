// AVX-512 intrinsics: the compiler's, or the emulation under tests/native that
// lets machines without AVX-512 run these very kernel files.
#pragma once

#ifdef FR_EMULATE_AVX512
#include "amx_emulation.h"
#include "avx512_emulation.h"
#else
#include <immintrin.h>
#endif

namespace {
// The intrinsics of tiles do not tell the compiler which memory they read: what was written is in memory from here on.
inline void tiles_read_memory() { asm volatile("" ::: "memory"); }

// The value, which the compiler may no longer fold into a memory operand.
inline __m512 in_register(__m512 v) {
#ifndef FR_EMULATE_AVX512
  asm("" : "+v"(v));
#endif
  return v;
}
}  // namespace
