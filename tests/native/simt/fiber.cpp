#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace fused_resnet::simt {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 128 << 10;
#else
constexpr size_t kStackBytes = 32 << 10;
#endif

[[noreturn]] void die(const char* what) {
  std::perror(what);
  std::abort();
}

// After every switch, on the stack that now runs.
void arrive([[maybe_unused]] Fiber* fiber) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fiber->sanitizer_state, nullptr, nullptr);
#endif
}

Fiber* arriving = nullptr;

void first_entry() {
  Fiber* self = arriving;
  arrive(self);
  self->entry();
  std::abort();
}

#ifdef __x86_64__
// swapcontext without its two system calls: the registers that a call preserves.
extern "C" void fr_simt_switch(void** save, void* load);
asm(R"(
.text
.type fr_simt_switch, @function
fr_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fr_simt_switch, .-fr_simt_switch
)");

void prepare(Fiber* fiber) {
  auto* top = reinterpret_cast<uint64_t*>(reinterpret_cast<uintptr_t>(fiber->bottom) + fiber->size);
  *--top = 0;  // the entry's return address: a stack trace ends here
  *--top = reinterpret_cast<uint64_t>(&first_entry);
  for (int i = 0; i < 6; ++i) *--top = 0;
  fiber->stack_pointer = top;
}
void change_stack(Fiber* from, Fiber* to) { fr_simt_switch(&from->stack_pointer, to->stack_pointer); }
#else
ucontext_t* context(Fiber* fiber) {
  if (fiber->stack_pointer == nullptr) fiber->stack_pointer = new ucontext_t;
  return static_cast<ucontext_t*>(fiber->stack_pointer);
}
void prepare(Fiber* fiber) {
  getcontext(context(fiber));
  context(fiber)->uc_stack.ss_sp = const_cast<void*>(fiber->bottom);
  context(fiber)->uc_stack.ss_size = fiber->size;
  makecontext(context(fiber), first_entry, 0);
}
void change_stack(Fiber* from, Fiber* to) { swapcontext(context(from), context(to)); }
#endif

}  // namespace

Fiber& main_fiber() {
  static Fiber fiber = [] {
    Fiber self;
    pthread_attr_t attributes;
    void* bottom = nullptr;
    if (pthread_getattr_np(pthread_self(), &attributes) != 0) die("pthread_getattr_np");
    pthread_attr_getstack(&attributes, &bottom, &self.size);
    pthread_attr_destroy(&attributes);
    self.bottom = bottom;
    return self;
  }();
  return fiber;
}

Fiber* new_fiber(void (*entry)()) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* block = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (block == MAP_FAILED) die("a fibre's stack");
  if (mprotect(block, page, PROT_NONE) != 0) die("a fibre's guard page");
  auto* fiber = new Fiber;
  fiber->bottom = static_cast<unsigned char*>(block) + page;
  fiber->size = kStackBytes;
  fiber->entry = entry;
  prepare(fiber);
  return fiber;
}

void restart(Fiber* fiber) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(fiber->bottom, fiber->size);
#endif
  fiber->sanitizer_state = nullptr;
  prepare(fiber);
}

void switch_fiber(Fiber* from, Fiber* to) {
  arriving = to;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from->sanitizer_state, to->bottom, to->size);
#endif
  change_stack(from, to);
  arrive(from);
}

}  // namespace fused_resnet::simt
