// FUSED_RESNET_VERBOSE: one line on standard error for each new (operator, extent,
// dtype), with what serves it: the CPU's kernels by name, or a GPU.
#pragma once

#include <cstdio>
#include <initializer_list>
#include <mutex>
#include <set>
#include <string>

#include "fused_resnet/capability.h"
#include "fused_resnet/conv.h"
#include "fused_resnet/types.h"

namespace fused_resnet::bindings {

inline bool verbose = false;

inline const char* dtype_name(DType dtype) {
  constexpr const char* kNames[] = {"float64", "float32", "bfloat16", "float16"};
  return kNames[static_cast<int>(dtype)];
}

inline void say_once(const std::string& line) {
  static std::mutex mutex;
  static std::set<std::string> said;
  const std::lock_guard<std::mutex> lock(mutex);
  if (said.insert(line).second) std::fprintf(stderr, "%s\n", line.c_str());
}

inline void say(const char* op, const Shape& shape, const char* family, std::initializer_list<const char*> passes,
                bool cuda) {
  std::string line = std::string("fused_resnet: ") + op + " n=" + std::to_string(shape.n) +
                     " c=" + std::to_string(shape.c) + " s=" + std::to_string(shape.s) + " " + dtype_name(shape.dtype) +
                     (shape.layout == Layout::kNHWC ? " nhwc:" : " nchw:");
  for (const char* pass : passes) {
    if (*pass == '\0') continue;
    const KernelInfo* kernel = cuda ? nullptr : cpu::selected_kernel(family, pass, shape.dtype);
    line += std::string(" ") + (kernel != nullptr ? kernel->name : cuda ? pass : "none");
  }
  line += std::string(" (") + (cuda ? "cuda" : isa_name(cpu::current_isa())) + ")";
  say_once(line);
}

// `plan`: what computes it.
inline void say_conv(const char* op, const ConvShape& s, const std::string& plan) {
  const auto pair = [](int64_t a, int64_t b) { return std::to_string(a) + "x" + std::to_string(b); };
  say_once(std::string("fused_resnet: ") + op + " n=" + std::to_string(s.n) + " " + std::to_string(s.c) + "->" +
           std::to_string(s.k) + " " + pair(s.h, s.w) + " kernel " + pair(s.r, s.s) + " stride " +
           pair(s.stride_h, s.stride_w) + " groups " + std::to_string(s.groups) + " " + dtype_name(s.dtype) + ": " +
           plan);
}

}  // namespace fused_resnet::bindings
