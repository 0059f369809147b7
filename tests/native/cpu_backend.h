// The CPU as a backend under test, at one level of instruction sets.
#pragma once

#include "backend.h"
#include "fused_resnet/capability.h"

namespace fused_resnet::native_test {

Backend cpu_backend(CpuIsa isa);

}  // namespace fused_resnet::native_test
