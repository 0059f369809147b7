// The functions that emulated kernels call.
#define FR_EMULATION_DEFINITIONS
#include "avx512_emulation.h"

#include "amx_emulation.h"
