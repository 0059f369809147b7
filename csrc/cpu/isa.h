// Which instruction sets this build holds, this CPU has, and the cap allows.
#pragma once

#include "fused_resnet/capability.h"

#if defined(__x86_64__) || defined(_M_X64)
#define FR_X86 1
#else
#define FR_X86 0
#endif

namespace fused_resnet::cpu {
// One product of tiles, right or wrong: asked only where CPU and operating system say that AMX is there.
bool amx_works();
}  // namespace fused_resnet::cpu
