// Running chunks on the caller's threads.
#pragma once

#include "fused_resnet/types.h"

namespace fused_resnet::cpu {

// Below this many elements a thread team costs more than it saves.
inline constexpr int64_t kSerialElements = 16384;

// f(begin, end) over disjoint ranges of [0, count); `elements` is the work in all.
template <class F>
void for_chunks(const Runner& runner, int64_t count, int64_t elements, const F& f) {
  if (count <= 0) return;
  if (runner.for_each == nullptr || runner.threads <= 1 || count == 1 || elements < kSerialElements) {
    f(static_cast<int64_t>(0), count);
    return;
  }
  const Runner::Task task = [](void* arg, int64_t begin, int64_t end) { (*static_cast<const F*>(arg))(begin, end); };
  runner.for_each(count, task, const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace fused_resnet::cpu
