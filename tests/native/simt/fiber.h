// Stacks to switch between, with guard pages, known to AddressSanitizer.
#pragma once

#include <cstddef>

namespace fused_resnet::simt {

struct Fiber {
  void* stack_pointer = nullptr;    // while it does not run
  const void* bottom = nullptr;     // lowest address of its stack
  size_t size = 0;                  // of its stack
  void* sanitizer_state = nullptr;  // while it does not run
  void (*entry)() = nullptr;        // never returns
  int thread = 0;                   // whose turn it has: the scheduler's
};

// The caller's own stack as a fibre, to be switched back to.
Fiber& main_fiber();
Fiber* new_fiber(void (*entry)());
// Forgets what the fibre was doing; when switched to, it begins at its entry again.
void restart(Fiber* fiber);
void switch_fiber(Fiber* from, Fiber* to);

}  // namespace fused_resnet::simt
