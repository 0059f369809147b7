#include "isa.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#if FR_X86
#include <cpuid.h>
#include <sys/syscall.h>
#endif

namespace fused_resnet {

namespace {
constexpr const char* kIsaNames[kCpuIsaCount] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};

const char* note = nullptr;

#if FR_X86
// The operating system must save the registers too: CPUID alone does not say so.
uint64_t enabled_state() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & (1u << 27)) == 0) return 0;  // OSXSAVE
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Tile registers are eight kilobytes that Linux saves only for processes that ask. Once asked, always allowed.
bool amx_allowed(uint64_t state) {
  constexpr uint64_t kTileState = 0x60000;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if ((state & kTileState) != kTileState) {
    note = "this CPU has AMX, but the operating system has not enabled it";
  } else if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
    note = "this CPU has AMX, but the operating system refused the permission to use it";
  } else if (!cpu::amx_works()) {
    note = "this CPU has AMX, but a first product came out wrong";
  } else {
    return true;
  }
  return false;
}

CpuIsa detect() {
#ifdef FR_EMULATE_AVX512
  return CpuIsa::kAmx;
#endif
  constexpr uint64_t kAvxState = 0x6, kAvx512State = 0xe6;
  const uint64_t state = enabled_state();
  unsigned a = 0, b = 0, c = 0, d = 0;
  if ((state & kAvxState) != kAvxState || !__get_cpuid(1, &a, &b, &c, &d)) return CpuIsa::kScalar;
  const bool fma = c & (1u << 12), f16c = c & (1u << 29);
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return CpuIsa::kScalar;
  const bool avx2 = b & (1u << 5);
  if (!avx2 || !fma || !f16c) return CpuIsa::kScalar;
  const bool f = b & (1u << 16), dq = b & (1u << 17), bw = b & (1u << 30), vl = b & (1u << 31);
  if ((state & kAvx512State) != kAvx512State || !f || !dq || !bw || !vl) return CpuIsa::kAvx2;
  const bool tiles = d & (1u << 24), tiles_bf16 = d & (1u << 22);
  const bool bf16 = a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));
  if (!bf16) return CpuIsa::kAvx512;
  return tiles && tiles_bf16 && amx_allowed(state) ? CpuIsa::kAmx : CpuIsa::kAvx512Bf16;
}
#else
CpuIsa detect() { return CpuIsa::kScalar; }
#endif

std::atomic<int> isa_cap{kCpuIsaCount - 1};
}  // namespace

const char* isa_name(CpuIsa isa) { return kIsaNames[static_cast<int>(isa)]; }

bool parse_isa(const char* name, CpuIsa* result) {
  for (int i = 0; i < kCpuIsaCount; ++i) {
    if (std::strcmp(name, kIsaNames[i]) == 0) {
      *result = static_cast<CpuIsa>(i);
      return true;
    }
  }
  return false;
}

namespace cpu {

CpuIsa detected_isa() {
  static const CpuIsa isa = detect();
  return isa;
}

CpuIsa current_isa() {
  const int cap = isa_cap.load(std::memory_order_relaxed), have = static_cast<int>(detected_isa());
  return static_cast<CpuIsa>(cap < have ? cap : have);
}

// Intel's AVX512_BF16 multiplies half as much as its fma: 85 and 173 GFLOP/s on Emerald Rapids. Who caps the level at
// AVX512_BF16 on a processor with AMX asks for it.
bool pairs_are_slow() {
#if FR_X86
  static const bool intel = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kGenu = 0x756e6547;
    return __get_cpuid(0, &a, &b, &c, &d) && b == kGenu;
  }();
  const CpuIsa isa = current_isa();
  return isa == CpuIsa::kAmx || (intel && isa == CpuIsa::kAvx512Bf16 && detected_isa() == isa);
#else
  return false;
#endif
}

const char* isa_note() {
  detected_isa();
  return note;
}

Status set_isa_cap(CpuIsa cap) {
  isa_cap.store(static_cast<int>(cap), std::memory_order_relaxed);
  return {};
}

int64_t last_level_cache_bytes() {
#ifdef FR_LAST_LEVEL_CACHE_BYTES  // tests: small, so that small tensors are streamed
  return FR_LAST_LEVEL_CACHE_BYTES;
#endif
  static const int64_t bytes = [] {
    const long l3 = sysconf(_SC_LEVEL3_CACHE_SIZE), l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
    constexpr long kUnknown = 16L << 20;
    return static_cast<int64_t>(l3 > 0 ? l3 : l2 > 0 ? l2 : kUnknown);
  }();
  return bytes;
}

int64_t second_level_cache_bytes() {
#ifdef FR_SECOND_LEVEL_CACHE_BYTES  // tests: which order tiles and panels take does not depend on the machine
  return FR_SECOND_LEVEL_CACHE_BYTES;
#endif
  static const int64_t bytes = std::max(static_cast<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE)), int64_t{0});
  return bytes;
}

}  // namespace cpu
}  // namespace fused_resnet
