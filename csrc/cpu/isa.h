// Which instruction sets this build holds, this CPU has, and the cap allows.
#pragma once

#include "fused_resnet/capability.h"

#if defined(__x86_64__) || defined(_M_X64)
#define FR_X86 1
#else
#define FR_X86 0
#endif
