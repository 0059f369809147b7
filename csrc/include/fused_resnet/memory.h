// The activation pool: large host blocks reused from step to step.
//
// A training step allocates and frees the same gigabytes each time. The C library
// returns them to the system, and touching fresh pages costs several times what
// the kernels need to fill them. The pool keeps them, asks for huge pages, splits
// and joins blocks (first fit by address).
#pragma once

#include "fused_resnet/types.h"

namespace fused_resnet::cpu {

inline constexpr int64_t kPoolMinBytes = int64_t{1} << 20;  // smaller requests are malloc's business

struct PoolStats {
  int64_t reserved_bytes = 0;   // address space held
  int64_t live_bytes = 0;       // handed out now
  int64_t peak_live_bytes = 0;  // most ever handed out at once
};

// 64-byte aligned, uninitialised; null when the system gives no memory.
void* pool_allocate(int64_t bytes);
bool pool_owns(const void* p);
void pool_free(void* p);  // p from pool_allocate
PoolStats pool_stats();
// Gives every unused page back to the system. Live blocks stay.
void pool_trim();

}  // namespace fused_resnet::cpu
